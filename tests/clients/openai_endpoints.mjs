// OpenAI's client for Node, as its users write responses, embeddings and legacy completions with it.
import OpenAI from "openai";
import { zodResponsesFunction, zodTextFormat } from "openai/helpers/zod";
import { z } from "zod";
import { baseURL, brokeKey, city, failure, key, model, report, wire, wish } from "./report.mjs";

const City = z.object({ name: z.string(), inhabitants: z.number() });
const tools = [zodResponsesFunction({ name: "weather", parameters: z.object({ city: z.string() }) })];
const calling = [
  { role: "user", content: wish({ tool_calls: [{ name: "weather", arguments: { city: "Köln" } }], text: "Sunny." }) },
];

const client = (options = {}) =>
  new OpenAI({ baseURL, apiKey: key, maxRetries: 1, fetch: wire().fetch, ...options });
const seenIn = (response) => ({
  text: response.output_text,
  usage: [response.usage.input_tokens, response.usage.output_tokens],
});
const callsIn = (response) => response.output.map((item) => [item.name, JSON.parse(item.arguments)]);
const described = (error) => ({ status: error.status ?? null, code: error.code ?? null });

const hello = { model, input: "Hello", instructions: "Be brief." };

const responsesPlain = async () => seenIn(await client().responses.create(hello));

async function responsesStreamed() {
  let text = "";
  let last = null;
  for await (const event of await client().responses.create({ ...hello, stream: true })) {
    if (event.type === "response.output_text.delta") text += event.delta;
    last = event;
  }
  if (last.type !== "response.completed") throw new Error(last.type);
  return { usage: [last.response.usage.input_tokens, last.response.usage.output_tokens], text };
}

async function responsesTools() {
  const first = await client().responses.create({ model, input: calling, tools });
  const outputs = first.output.map((item) => ({
    type: "function_call_output",
    call_id: item.call_id,
    output: "sun in abundance",
  }));
  const last = await client().responses.create({ model, input: [...calling, ...first.output, ...outputs], tools });
  return { calls: callsIn(first), text: last.output_text };
}

async function responsesToolsStreamed() {
  return { calls: callsIn(await client().responses.stream({ model, input: calling, tools }).finalResponse()) };
}

async function responsesSchema() {
  const format = zodTextFormat(City, "city");
  return (await client().responses.parse({ model, input: wish({ json: city }), text: { format } })).output_parsed;
}

async function responsesCut() {
  const response = await client().responses.create({ model, input: wish({ tokens: 100 }), max_output_tokens: 30 });
  const isCut = response.status === "incomplete" && response.incomplete_details.reason === "max_output_tokens";
  return { is_cut: isCut, tokens: response.usage.output_tokens };
}

async function responsesConversation() {
  const first = { role: "user", content: wish({ usage: "reasoning" }) };
  const opening = await client().responses.create({ model, input: [first] });
  const again = { role: "user", content: wish({ text: "Sunny." }) };
  return { text: (await client().responses.create({ model, input: [first, ...opening.output, again] })).output_text };
}

async function responsesCancelled() {
  const seen = wire();
  let text = "";
  const input = wish({ tokens: 400, chunk_tokens: 4, pace_s: 0.02 });
  const stream = await client({ fetch: seen.fetch }).responses.create({ model, input, stream: true });
  for await (const event of stream) {
    if (event.type === "response.output_text.delta") text += event.delta;
    if (text) break;
  }
  return { text, request_ids: seen.requestIds };
}

async function embeddings() {
  const input = ["a", "Grüße"];
  const floats = await client().embeddings.create({ model, input, encoding_format: "float" });
  const unpacked = await client().embeddings.create({ model, input });
  const tokens = await client().embeddings.create({ model, input: [[1, 2, 3], [4]], dimensions: 3 });
  return {
    vectors: floats.data.length,
    is_same_unpacked: JSON.stringify(floats.data) === JSON.stringify(unpacked.data),
    usage: [floats.usage.prompt_tokens, tokens.usage.prompt_tokens],
    dimensions: tokens.data[0].embedding.length,
  };
}

const prompt = { model, prompt: "Hello", max_tokens: 64 };

async function completionsPlain() {
  const answer = await client().completions.create(prompt);
  const { text, finish_reason: finish } = answer.choices[0];
  return { text, finish, usage: [answer.usage.prompt_tokens, answer.usage.completion_tokens] };
}

async function completionsStreamed() {
  const seen = { text: "", finish: null };
  for await (const chunk of await client().completions.create({ ...prompt, stream: true })) {
    seen.text += chunk.choices[0].text;
    seen.finish = chunk.choices[0].finish_reason;
  }
  return seen;
}

const failing = (call, apiKey = brokeKey) =>
  failure((seen) => call(client({ fetch: seen.fetch, apiKey })), described);

const errors = async () => ({
  responses: await failing((broke) => broke.responses.create({ model, input: "x" })),
  embeddings: await failing((broke) => broke.embeddings.create({ model, input: "x" })),
  completions: await failing((broke) => broke.completions.create({ model, prompt: "x" })),
  state: await failing((rich) => rich.responses.create({ model, input: "x", previous_response_id: "resp_1" }), key),
});

await report({
  responses_plain: responsesPlain,
  responses_streamed: responsesStreamed,
  responses_tools: responsesTools,
  responses_tools_streamed: responsesToolsStreamed,
  responses_schema: responsesSchema,
  responses_cut: responsesCut,
  responses_conversation: responsesConversation,
  responses_cancelled: responsesCancelled,
  embeddings,
  completions_plain: completionsPlain,
  completions_streamed: completionsStreamed,
  errors,
});
