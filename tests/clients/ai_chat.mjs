// Vercel's AI SDK over chat completions, by the provider that its users would pick (`VIA`): openai-compatible or openai.
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateObject, generateText, isStepCount, RetryError, streamText, tool } from "ai";
import { z } from "zod";
import { baseURL, brokeKey, city, failure, key, model, report, wire, wish } from "./report.mjs";

globalThis.AI_SDK_LOG_WARNINGS = false;

const City = z.object({ name: z.string(), inhabitants: z.number() });
const calling = wish({ tool_calls: [{ name: "weather", arguments: { city: "Köln" } }], text: "It is sunny." });
const tools = {
  weather: tool({
    description: "The weather in a city.",
    inputSchema: z.object({ city: z.string() }),
    execute: async () => "sun in abundance",
  }),
};

function languageModel({ name = model, apiKey = key, fetch = wire().fetch } = {}) {
  if (process.env.VIA === "openai") return createOpenAI({ baseURL, apiKey, fetch }).chat(name);
  return createOpenAICompatible({
    name: "tollgate",
    baseURL,
    apiKey,
    fetch,
    includeUsage: true,
    supportsStructuredOutputs: true,
  })(name);
}

const named = (calls) => calls.map((call) => [call.toolName, call.input]);

function described(error) {
  const last = RetryError.isInstance(error) ? error.lastError : error;
  return {
    cause: last.constructor.name,
    status: last.statusCode ?? null,
    code: last.data?.error?.code ?? null,
    is_retryable: last.isRetryable ?? null,
    retry_after: last.responseHeaders?.["retry-after"] ?? null,
  };
}

async function plain() {
  const answer = await generateText({ model: languageModel(), prompt: "Hello" });
  return {
    text: answer.text,
    finish: answer.finishReason,
    usage: [answer.usage.inputTokens, answer.usage.outputTokens],
  };
}

async function streamed() {
  const answer = streamText({ model: languageModel(), prompt: "Hello" });
  let text = "";
  for await (const bit of answer.textStream) text += bit;
  const usage = await answer.usage;
  return { text, finish: await answer.finishReason, usage: [usage.inputTokens, usage.outputTokens] };
}

async function toolsUsed() {
  const answer = await generateText({ model: languageModel(), prompt: calling, tools, stopWhen: isStepCount(2) });
  return { calls: named(answer.steps[0].toolCalls), text: answer.text };
}

async function toolsStreamed() {
  const answer = streamText({ model: languageModel(), prompt: calling, tools, stopWhen: isStepCount(1) });
  await answer.consumeStream();
  return { calls: named(await answer.toolCalls) };
}

async function schema() {
  const answer = await generateObject({ model: languageModel(), prompt: wish({ json: city }), schema: City });
  return answer.object;
}

const generate = (behaviour, options = {}, settings = {}) =>
  failure(
    (seen) =>
      generateText({
        model: languageModel({ fetch: seen.fetch, ...options }),
        prompt: wish(behaviour),
        maxRetries: 1,
        ...settings,
      }),
    described,
  );

const errors = async () => ({
  bad_request: await generate({ status: 400 }),
  unauthorized: await generate({}, { apiKey: "sk-tg-unknown" }),
  not_covered: await generate({}, { apiKey: brokeKey }),
  model_not_found: await generate({}, { name: "nobody" }),
  rate_limited: await generate({ status: 429, retry_after: 3 }),
  provider_failed: await generate({ status: 500 }),
});

const unavailable = () => generate({}, {}, { maxRetries: 0 });

async function cancelled() {
  const seen = wire();
  const controller = new AbortController();
  let text = "";
  const answer = streamText({
    model: languageModel({ fetch: seen.fetch }),
    prompt: wish({ tokens: 400, chunk_tokens: 4, pace_s: 0.02 }),
    abortSignal: controller.signal,
  });
  for await (const bit of answer.textStream) {
    text += bit;
    controller.abort();
  }
  return { text, request_ids: seen.requestIds };
}

const timedOut = () => generate({ delay_s: 1 }, {}, { abortSignal: AbortSignal.timeout(300) });

await report(
  {
    plain,
    streamed,
    tools: toolsUsed,
    tools_streamed: toolsStreamed,
    schema,
    errors,
    cancelled,
    timed_out: timedOut,
  },
  { unavailable },
);
