// The official OpenAI client for Node, as its users write it: prints one JSON object of what it saw.
import OpenAI from "openai";

const [baseURL, apiKey, model] = process.argv.slice(2);
const messages = [{ role: "user", content: "Say something." }];
const client = new OpenAI({ baseURL, apiKey, maxRetries: 0 });

const plain = await client.chat.completions.create({ model, messages }).withResponse();

let streamed = "";
let usage = null;
const stream = await client.chat.completions.create({
  model,
  messages,
  stream: true,
  stream_options: { include_usage: true },
});
for await (const chunk of stream) {
  streamed += chunk.choices[0]?.delta?.content ?? "";
  usage = chunk.usage ?? usage;
}

let refused = null;
try {
  await new OpenAI({ baseURL, apiKey: "sk-tg-unknown", maxRetries: 0 }).models.list();
} catch (error) {
  refused = { status: error.status, code: error.code, name: error.constructor.name };
}

const models = [];
for await (const entry of client.models.list()) models.push(entry.id);

console.log(
  JSON.stringify({
    plain: plain.data.choices[0].message.content,
    requestId: plain.response.headers.get("x-request-id"),
    streamed,
    usage,
    refused,
    models,
  }),
);
