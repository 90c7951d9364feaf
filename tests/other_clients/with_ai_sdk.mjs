// The AI SDK (npm `ai`): two turns with a tool at hand, the server's own answer as history, and a stream.
import assert from "node:assert";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, streamText, tool } from "ai";
import { z } from "zod";

const provider = createOpenAICompatible({
  name: "onebase",
  baseURL: `${process.env.ONEBASE_URL}/v1`,
  apiKey: process.env.ONEBASE_KEY,
});
const clock = tool({ description: "Tells the time", inputSchema: z.object({}), execute: async () => "noon" });
const options = { model: provider("tiny"), tools: { clock }, maxOutputTokens: 30 };
const messages = [{ role: "user", content: "hi" }];

const first = await generateText({ ...options, messages });
assert.ok(first.text);
const history = [...messages, ...first.response.messages, { role: "user", content: "and now?" }];
assert.ok((await generateText({ ...options, messages: history })).text);
let streamed = "";
for await (const piece of streamText({ ...options, messages }).textStream) streamed += piece;
assert.equal(streamed, first.text);
console.log("AI SDK: well");
