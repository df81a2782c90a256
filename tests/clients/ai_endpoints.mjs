// Vercel's AI SDK over responses, embeddings and legacy completions.
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { embed, embedMany, generateObject, generateText, isStepCount, streamText, tool } from "ai";
import { z } from "zod";
import { baseURL, brokeKey, city, failure, key, model, report, wire, wish } from "./report.mjs";

globalThis.AI_SDK_LOG_WARNINGS = false;

const City = z.object({ name: z.string(), inhabitants: z.number() });
const calling = wish({ tool_calls: [{ name: "weather", arguments: { city: "Köln" } }], text: "Sunny." });
const tools = {
  weather: tool({
    description: "The weather in a city.",
    inputSchema: z.object({ city: z.string() }),
    execute: async () => "sun in abundance",
  }),
};
// Nothing is stored, so what was said has to be sent again whole and not by reference.
const providerOptions = { openai: { store: false } };

const openai = ({ apiKey = key, fetch = wire().fetch } = {}) => createOpenAI({ baseURL, apiKey, fetch });
const compatible = () => createOpenAICompatible({ name: "tollgate", baseURL, apiKey: key, fetch: wire().fetch });
const hello = { system: "Be brief.", prompt: "Hello", providerOptions };
const named = (calls) => calls.map((call) => [call.toolName, call.input]);
const described = (error) => ({
  message: error.message,
  status: error.statusCode ?? null,
  code: error.data?.error?.code ?? null,
});

async function responsesPlain() {
  const answer = await generateText({ model: openai().responses(model), ...hello });
  return { text: answer.text, usage: [answer.usage.inputTokens, answer.usage.outputTokens] };
}

async function responsesStreamed() {
  const answer = streamText({ model: openai().responses(model), ...hello });
  let text = "";
  for await (const bit of answer.textStream) text += bit;
  const usage = await answer.usage;
  return { text, usage: [usage.inputTokens, usage.outputTokens] };
}

async function responsesTools() {
  const settings = { model: openai().responses(model), prompt: calling, tools, providerOptions };
  const answer = await generateText({ ...settings, stopWhen: isStepCount(2) });
  return { calls: named(answer.steps[0].toolCalls), text: answer.text };
}

async function responsesToolsStreamed() {
  const settings = { model: openai().responses(model), prompt: calling, tools, providerOptions };
  const answer = streamText({ ...settings, stopWhen: isStepCount(1) });
  await answer.consumeStream();
  return { calls: named(await answer.toolCalls) };
}

// A second turn: the items of the first are sent whole, or by reference unless the user says that nothing is stored.
async function conversation(options) {
  const settings = { model: openai().responses(model), providerOptions: options };
  const first = { role: "user", content: wish({ usage: "reasoning" }) };
  const opening = await generateText({ ...settings, messages: [first] });
  const again = { role: "user", content: wish({ text: "Sunny." }) };
  return generateText({ ...settings, messages: [first, ...opening.response.messages, again] });
}

const responsesConversation = async () => ({ text: (await conversation(providerOptions)).text });

async function responsesSchema() {
  const prompt = wish({ json: city });
  return (await generateObject({ model: openai().responses(model), prompt, schema: City, providerOptions })).object;
}

async function responsesCut() {
  const settings = { model: openai().responses(model), prompt: wish({ tokens: 100 }), providerOptions };
  const answer = await generateText({ ...settings, maxOutputTokens: 30 });
  return { is_cut: answer.finishReason === "length", tokens: answer.usage.outputTokens };
}

async function responsesCancelled() {
  const seen = wire();
  const controller = new AbortController();
  let text = "";
  const answer = streamText({
    model: openai({ fetch: seen.fetch }).responses(model),
    prompt: wish({ tokens: 400, chunk_tokens: 4, pace_s: 0.02 }),
    abortSignal: controller.signal,
    providerOptions,
  });
  for await (const bit of answer.textStream) {
    text += bit;
    controller.abort();
  }
  return { text, request_ids: seen.requestIds };
}

async function embeddings() {
  const values = ["a", "Grüße"];
  const many = await embedMany({ model: openai().embedding(model), values });
  const others = await embedMany({ model: compatible().embeddingModel(model), values });
  const short = await embed({
    model: openai().embedding(model),
    value: "a",
    providerOptions: { openai: { dimensions: 3 } },
  });
  return {
    vectors: many.embeddings.length,
    is_same_unpacked: JSON.stringify(many.embeddings) === JSON.stringify(others.embeddings),
    usage: [many.usage.tokens, others.usage.tokens],
    dimensions: short.embedding.length,
  };
}

async function completionsPlain() {
  const settings = { prompt: "Hello", maxOutputTokens: 64 };
  const answer = await generateText({ model: compatible().completionModel(model), ...settings });
  return {
    text: answer.text,
    finish: answer.finishReason,
    usage: [answer.usage.inputTokens, answer.usage.outputTokens],
  };
}

async function completionsStreamed() {
  const answer = streamText({ model: openai().completion(model), prompt: "Hello", maxOutputTokens: 64 });
  let text = "";
  for await (const bit of answer.textStream) text += bit;
  return { text, finish: await answer.finishReason };
}

const failing = (call, apiKey = brokeKey) =>
  failure((seen) => call(openai({ fetch: seen.fetch, apiKey })), described);

const errors = async () => ({
  responses: await failing((broke) => generateText({ model: broke.responses(model), ...hello })),
  embeddings: await failing((broke) => embed({ model: broke.embedding(model), value: "x" })),
  completions: await failing((broke) => generateText({ model: broke.completion(model), prompt: "x" })),
  state: await failing(
    (rich) =>
      generateText({
        model: rich.responses(model),
        prompt: "x",
        providerOptions: { openai: { previousResponseId: "resp_1" } },
      }),
    key,
  ),
});

const references = () => failure(() => conversation({}), described);

await report(
  {
    responses_plain: responsesPlain,
    responses_streamed: responsesStreamed,
    responses_tools: responsesTools,
    responses_tools_streamed: responsesToolsStreamed,
    responses_conversation: responsesConversation,
    responses_schema: responsesSchema,
    responses_cut: responsesCut,
    responses_cancelled: responsesCancelled,
    embeddings,
    completions_plain: completionsPlain,
    completions_streamed: completionsStreamed,
    errors,
  },
  { references },
);
