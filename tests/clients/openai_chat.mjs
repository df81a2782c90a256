// OpenAI's client for Node, as its users write chat completions with it.
import OpenAI from "openai";
import { zodFunction, zodResponseFormat } from "openai/helpers/zod";
import { z } from "zod";
import { baseURL, brokeKey, city, failure, key, model, report, wire, wish } from "./report.mjs";

const City = z.object({ name: z.string(), inhabitants: z.number() });
const tools = [zodFunction({ name: "weather", parameters: z.object({ city: z.string() }) })];
const calling = wish({ tool_calls: [{ name: "weather", arguments: { city: "Köln" } }], text: "It is sunny." });

const client = (options = {}) => new OpenAI({ baseURL, apiKey: key, fetch: wire().fetch, ...options });
const said = (text) => [{ role: "user", content: text }];
const named = (calls) => calls.map((call) => [call.function.name, JSON.parse(call.function.arguments)]);
const described = (error) => ({
  status: error.status ?? null,
  code: error.code ?? null,
  retry_after: error.headers?.get("retry-after") ?? null,
});

async function plain() {
  const answer = await client().chat.completions.create({ model, messages: said("Hello") });
  const { message, finish_reason: finish } = answer.choices[0];
  return { text: message.content, finish, usage: [answer.usage.prompt_tokens, answer.usage.completion_tokens] };
}

async function streamed() {
  const seen = { text: "", finish: null, usage: null };
  const stream = await client().chat.completions.create({
    model,
    messages: said("Hello"),
    stream: true,
    stream_options: { include_usage: true },
  });
  for await (const chunk of stream) {
    seen.text += chunk.choices[0]?.delta?.content ?? "";
    seen.finish = chunk.choices[0]?.finish_reason ?? seen.finish;
    if (chunk.usage) seen.usage = [chunk.usage.prompt_tokens, chunk.usage.completion_tokens];
  }
  return seen;
}

async function toolsUsed() {
  const messages = said(calling);
  const first = (await client().chat.completions.create({ model, messages, tools })).choices[0].message;
  const results = first.tool_calls.map((call) => ({
    role: "tool",
    tool_call_id: call.id,
    content: "sun in abundance",
  }));
  const last = await client().chat.completions.create({ model, messages: [...messages, first, ...results], tools });
  return { calls: named(first.tool_calls), text: last.choices[0].message.content };
}

async function toolsStreamed() {
  const stream = client().chat.completions.stream({ model, messages: said(calling), tools });
  const answer = await stream.finalChatCompletion();
  return { calls: named(answer.choices[0].message.tool_calls) };
}

async function schema() {
  const answer = await client().chat.completions.parse({
    model,
    messages: said(wish({ json: city })),
    response_format: zodResponseFormat(City, "city"),
  });
  return answer.choices[0].message.parsed;
}

const create = (behaviour, options = {}, name = model) =>
  failure(
    (seen) =>
      client({ maxRetries: 1, fetch: seen.fetch, ...options }).chat.completions.create({
        model: name,
        messages: said(wish(behaviour)),
      }),
    described,
  );

const errors = async () => ({
  bad_request: await create({ status: 400 }),
  unauthorized: await create({}, { apiKey: "sk-tg-unknown" }),
  not_covered: await create({}, { apiKey: brokeKey }),
  model_not_found: await create({}, {}, "nobody"),
  rate_limited: await create({ status: 429, retry_after: 3 }),
  provider_failed: await create({ status: 500 }),
});

const unavailable = () => create({}, { maxRetries: 0 });

async function cancelled() {
  const seen = wire();
  let text = "";
  const stream = await client({ fetch: seen.fetch }).chat.completions.create({
    model,
    messages: said(wish({ tokens: 400, chunk_tokens: 4, pace_s: 0.02 })),
    stream: true,
  });
  for await (const chunk of stream) {
    text += chunk.choices[0].delta.content;
    if (text) stream.controller.abort();
  }
  return { text, request_ids: seen.requestIds };
}

const timedOut = () => create({ delay_s: 1 }, { maxRetries: 0, timeout: 300 });

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
