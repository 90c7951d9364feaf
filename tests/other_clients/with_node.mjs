// The npm `openai` client: completions, streams, responses, embeddings, models, errors, fine-tuning.
import assert from "node:assert";
import OpenAI from "openai";

const client = new OpenAI({ baseURL: `${process.env.ONEBASE_URL}/v1`, apiKey: process.env.ONEBASE_KEY });
const messages = [{ role: "user", content: "hi" }];

const text = await client.completions.create({ model: "plain", prompt: "abc é" });
assert.equal(text.choices[0].text, "abc é");
const plain = await client.chat.completions.create({ model: "tiny", messages, max_tokens: 30 });
let streamed = "";
const options = { stream: true, stream_options: { include_usage: true } };
for await (const chunk of await client.chat.completions.create({ model: "tiny", messages, max_tokens: 30, ...options })) {
  streamed += chunk.choices[0]?.delta?.content ?? "";
}
assert.equal(streamed, plain.choices[0].message.content);
assert.equal((await client.responses.create({ model: "tiny", input: "hi" })).output_text, streamed);
assert.equal((await client.embeddings.create({ model: "tiny", input: ["a"] })).data[0].embedding.length, 3);
assert.deepEqual((await client.models.list()).data.map((model) => model.id), ["tiny", "judge", "plain"]);
await assert.rejects(client.completions.create({ model: "nobody", prompt: "a" }), {
  status: 404,
  code: "model_not_found",
  param: "model",
});
const data = new File([JSON.stringify({ steps: 2 }) + "\n"], "data.jsonl");
const file = await client.files.create({ file: data, purpose: "fine-tune" });
let job = await client.fineTuning.jobs.create({ model: "tiny", training_file: file.id, suffix: "made" });
while (["queued", "running"].includes(job.status)) {
  await new Promise((done) => setTimeout(done, 100));
  job = await client.fineTuning.jobs.retrieve(job.id);
}
assert.equal(job.fine_tuned_model, "made");
assert.equal((await client.completions.create({ model: "made", prompt: "x" })).choices[0].text, "x");
console.log("npm openai: well");
