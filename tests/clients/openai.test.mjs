// The official JavaScript client, against the server at AMPOULE_URL (and one that wants keys at AMPOULE_GUARDED_URL).
import assert from "node:assert/strict";
import { test } from "node:test";
import OpenAI from "openai";

const connect = (url, apiKey = "any") => new OpenAI({ baseURL: `${url}/v1`, apiKey, maxRetries: 0, timeout: 60_000 });
const client = connect(process.env.AMPOULE_URL);
const messages = [{ role: "user", content: "Say something about é 東京 🚆." }];
const ask = (more = {}) => client.chat.completions.create({ model: "tiny", messages, max_tokens: 24, temperature: 0, ...more });
const parameters = {
  type: "object",
  properties: { city: { type: "string", enum: ["Oslo", "Lima", "Pune"] }, days: { type: "integer", minimum: 1, maximum: 9 } },
  required: ["city", "days"],
  additionalProperties: false,
};
const check = (text) => {
  const value = JSON.parse(text);
  assert.deepEqual(Object.keys(value).sort(), ["city", "days"]);
  assert.ok(["Oslo", "Lima", "Pune"].includes(value.city) && Number.isInteger(value.days) && value.days >= 1 && value.days <= 9);
};

test("a reply, and the same as a stream", async () => {
  const { data: whole, request_id } = await ask().withResponse();
  assert.match(request_id, /^req_/);
  assert.equal(whole.choices[0].finish_reason, "length");
  assert.equal(whole.usage.completion_tokens, 24);
  assert.equal(whole.usage.total_tokens, whole.usage.prompt_tokens + 24);
  let text = "", usage = null;
  const reasons = [];
  for await (const chunk of await ask({ stream: true, stream_options: { include_usage: true } })) {
    text += chunk.choices[0]?.delta?.content ?? "";
    if (chunk.choices[0]?.finish_reason) reasons.push(chunk.choices[0].finish_reason);
    usage = chunk.usage ?? usage;
  }
  assert.equal(text, whole.choices[0].message.content);
  assert.deepEqual(reasons, ["length"]);
  assert.equal(usage.completion_tokens, 24);
});

test("the helper for streams", async () => {
  const stream = client.chat.completions.stream({ model: "tiny", messages, max_tokens: 24, temperature: 0 });
  let text = "";
  stream.on("content", (delta) => (text += delta));
  const final = await stream.finalChatCompletion();
  assert.equal(final.choices[0].message.content, text);
  assert.equal(text, (await ask()).choices[0].message.content);
});

test("a stream that is left", async () => {
  const stream = await ask({ stream: true, max_tokens: 4000, ignore_eos: true });
  for await (const _ of stream) break;
  const controller = new AbortController();
  const other = client.chat.completions.create(
    { model: "tiny", messages, max_tokens: 4000, ignore_eos: true }, { signal: controller.signal });
  setTimeout(() => controller.abort(), 50);
  await assert.rejects(other, OpenAI.APIUserAbortError);
  assert.equal((await ask()).usage.completion_tokens, 24);
});

test("tools, by the client's own loop", async () => {
  const seen = [];
  const runner = client.chat.completions.runTools({
    model: "tiny", messages: [...messages], max_tokens: 200, temperature: 0,
    tool_choice: { type: "function", function: { name: "weather" } },
    tools: [{ type: "function", function: { name: "weather", description: "d", parameters, parse: JSON.parse, function: (args) => { seen.push(args); return "rain"; } } }],
  });
  await runner.done();
  assert.equal(seen.length, 1);
  check(JSON.stringify(seen[0]));
  const roles = runner.messages.map((message) => message.role);
  assert.deepEqual(roles.slice(0, 3), ["user", "assistant", "tool"]);
  const calls = {};
  const tools = ["a", "b"].map((name) => ({ type: "function", function: { name, parameters } }));
  let finish = null;
  for await (const chunk of await ask({ stream: true, tools, tool_choice: "required", max_tokens: 600, parallel_tool_calls: false })) {
    for (const part of chunk.choices[0].delta.tool_calls ?? []) {
      calls[part.index] = (calls[part.index] ?? "") + (part.function.arguments ?? "");
    }
    finish = chunk.choices[0].finish_reason ?? finish;
  }
  assert.equal(finish, "tool_calls");
  assert.deepEqual(Object.keys(calls), ["0"]);
  check(calls[0]);
});

test("json_schema", async () => {
  const parsed = await client.chat.completions.parse({
    model: "tiny", messages, max_tokens: 300, temperature: 1, seed: 4,
    response_format: { type: "json_schema", json_schema: { name: "weather", strict: true, schema: parameters } },
  });
  check(parsed.choices[0].message.content);
});

test("responses", async () => {
  const respond = (more) => client.responses.create({ model: "tiny", input: "Hello", max_output_tokens: 12, temperature: 0, ...more });
  const first = await respond();
  const second = await respond({ input: "And then?", previous_response_id: first.id });
  assert.equal(second.previous_response_id, first.id);
  assert.ok(second.usage.input_tokens_details.cached_tokens >= first.usage.total_tokens - 1);
  assert.equal((await respond({ input: "And then?", previous_response_id: first.id })).output_text, second.output_text);
  const { output_text: _, ...stored } = await client.responses.retrieve(first.id);
  const { output_text: __, ...given } = first;
  assert.deepEqual(stored, given);
  const items = [];
  for await (const item of client.responses.inputItems.list(first.id)) items.push(item.content[0].text);
  assert.deepEqual(items, ["Hello"]);
  const stream = client.responses.stream({ model: "tiny", input: "Hello", max_output_tokens: 12, temperature: 0 });
  const kinds = [];
  let text = "";
  for await (const event of stream) {
    assert.equal(event.sequence_number, kinds.length);
    kinds.push(event.type);
    if (event.type === "response.output_text.delta") text += event.delta;
  }
  assert.equal(text, first.output_text);
  assert.equal(kinds[0], "response.created");
  assert.equal(kinds.at(-1), "response.incomplete");
  const forced = await respond({
    tools: [{ type: "function", name: "weather", parameters, strict: true }],
    tool_choice: { type: "function", name: "weather" }, max_output_tokens: 300,
  });
  check(forced.output[0].arguments);
  const shaped = await client.responses.parse({
    model: "tiny", input: "Hello", max_output_tokens: 300,
    text: { format: { type: "json_schema", name: "weather", schema: parameters, strict: true } },
  });
  check(shaped.output_text);
  await client.responses.delete(first.id);
  await assert.rejects(client.responses.retrieve(first.id), OpenAI.NotFoundError);
});

test("models and completions", async () => {
  const names = [];
  for await (const model of client.models.list()) names.push(model.id);
  assert.deepEqual(names, ["tiny"]);
  const whole = await client.completions.create({ model: "tiny", prompt: "The harbour", max_tokens: 8, temperature: 0 });
  assert.equal(whole.usage.completion_tokens, 8);
});

test("errors are of their classes", async () => {
  await assert.rejects(ask({ temperature: 9 }), (error) => {
    assert.ok(error instanceof OpenAI.BadRequestError);
    assert.equal(error.param, "temperature");
    assert.match(error.requestID, /^req_/);
    return true;
  });
  await assert.rejects(ask({ model: "gpt-9" }), OpenAI.NotFoundError);
  await assert.rejects(ask({ messages: [{ role: "user", content: "word ".repeat(20_000) }] }), (error) => error.code === "context_length_exceeded");
  const stranger = connect(process.env.AMPOULE_GUARDED_URL, "not-a-key-of-tests");
  await assert.rejects(stranger.models.list(), OpenAI.AuthenticationError);
});
