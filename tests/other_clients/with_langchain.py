"""langchain-openai: chats, streams, tools, structured output, responses, text, embeddings."""

import os
from typing import Any

from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings

OPTIONS: dict[str, Any] = {"base_url": f"{os.environ['ONEBASE_URL']}/v1", "api_key": os.environ["ONEBASE_KEY"]}


@tool
def double(number: int) -> int:
    """Twice a number."""
    return 2 * number


chat = ChatOpenAI(model="plain", max_tokens=30, **OPTIONS)
answer = chat.invoke("hi")
assert "hi" in answer.content
assert answer.usage_metadata["total_tokens"] > 0
assert "".join(chunk.content for chunk in chat.stream("hi")) == answer.content
turns = [
    HumanMessage("hi"),
    AIMessage("", tool_calls=[{"name": "double", "args": {"number": 1}, "id": "1"}]),
    ToolMessage("2", tool_call_id="1"),
]
assert ChatOpenAI(model="tiny", max_tokens=30, **OPTIONS).invoke(turns).content
for method in ("json_schema", "function_calling", "json_mode"):
    schema = {"title": "person", "type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}
    model = ChatOpenAI(model="tiny", max_tokens=80, **OPTIONS)
    assert model.with_structured_output(schema, method=method).invoke("a person, as json") == {"name": "Ann"}
assert ChatOpenAI(model="tiny", max_tokens=30, use_responses_api=True, **OPTIONS).invoke("hi").text
assert OpenAI(model="tiny", max_tokens=30, **OPTIONS).invoke("abc é") == "abc é"
embeddings = OpenAIEmbeddings(model="tiny", check_embedding_ctx_length=False, **OPTIONS)
assert len(embeddings.embed_documents(["a", "b"])) == 2
print("langchain-openai: well")
