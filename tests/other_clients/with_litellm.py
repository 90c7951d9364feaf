"""litellm: chats, streams, tools, text, embeddings, responses, and its own error classes."""

import os

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"

import litellm

OPTIONS = {"api_base": f"{os.environ['ONEBASE_URL']}/v1", "api_key": os.environ["ONEBASE_KEY"], "max_tokens": 30}
USER = [{"role": "user", "content": "hi"}]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]

plain = litellm.completion(model="openai/tiny", messages=USER, **OPTIONS)
answer = plain.choices[0].message.content
assert "hi" in answer
assert plain.usage.total_tokens == plain.usage.prompt_tokens + plain.usage.completion_tokens
chunks = list(litellm.completion(model="openai/plain", messages=USER, stream=True, **OPTIONS))
assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == answer
told = litellm.completion(model="openai/tiny", messages=USER, tools=TOOLS, tool_choice="auto", **OPTIONS)
# The server's own answer back as history, with what litellm adds to it, and a call with its result.
call = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
turns = [
    *USER, told.choices[0].message.model_dump(), {"role": "user", "content": "call it"},
    {"role": "assistant", "content": None, "tool_calls": [call]},
    {"role": "tool", "tool_call_id": "call_1", "content": "done"},
]  # fmt: skip
again = litellm.completion(model="openai/tiny", messages=turns, tools=TOOLS, **OPTIONS)
assert again.choices[0].message.content
text = litellm.text_completion(model="text-completion-openai/tiny", prompt="abc é", **OPTIONS)
assert text.choices[0].text == "abc é"
options = {key: value for key, value in OPTIONS.items() if key != "max_tokens"}
assert len(litellm.embedding(model="openai/tiny", input=["a", "b"], **options).data) == 2
assert litellm.responses(model="openai/tiny", input="hi", **options).output[0].content[0].text == answer
try:
    litellm.completion(model="openai/nobody", messages=USER, **OPTIONS)
except litellm.NotFoundError as error:
    assert "This server has: tiny" in str(error)
else:
    raise AssertionError("an unknown model was answered")
print("litellm: well")
