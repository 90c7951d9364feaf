"""Whatever the body, the answer is no failure of the server, and an error has OpenAI's shape.

`make fuzz` does the same at length with schemathesis, over the OpenAPI document.
"""

import copy
import json
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "ab", "stop": ["x"], "logit_bias": {"5": 1}, "n": 2, "logprobs": 1, "echo": True},
    "/v1/chat/completions": {
        "messages": [{"role": "user", "content": "a"}],
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
        "tool_choice": "auto",
        "response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": {"type": "object"}}},
        "stream": True,
        "stream_options": {"include_usage": True},
    },
    "/v1/responses": {
        "input": [{"role": "user", "content": [{"type": "input_text", "text": "a"}]}],
        "text": {"format": {"type": "json_schema", "name": "s", "schema": {"type": "string"}}},
        "tools": [{"type": "function", "name": "f"}],
        "metadata": {"a": "b"},
    },
    "/v1/embeddings": {"input": ["a", "b"], "encoding_format": "base64"},
    "/v1/classify": {"input": "a"},
    "/tokenize": {"prompt": "a", "return_token_strs": True},
    "/detokenize": {"tokens": [5, 6]},
    "/v1/adapters": {"name": "a", "path": "a", "replace": True},
    "/v1/adapters/a/versions": {"path": "a", "promote": False},
    "/v1/adapters/a/promote": {"version": 1},
    "/v1/load_lora_adapter": {"lora_name": "a", "lora_path": "a"},
    "/v1/fine_tuning/jobs": {
        "model": "tiny",
        "training_file": "file-x",
        "method": {"type": "lora", "hyperparameters": {"rank": 2, "n_epochs": 1}},
    },
}
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["", "\ud800", "a\0b", "../x", "auto", "tiny", -1, 0, 2**63, 10**400, 1e308, "@", "tiny:x"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def places(document: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where a document can be changed."""
    found = [path] if path else []
    items = (
        document.items()
        if isinstance(document, dict)
        else enumerate(document)
        if isinstance(document, list)
        else ()
    )
    for key, value in items:
        found += places(value, (*path, key))
    return found


@pytest.mark.parametrize("path", BODIES)
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
async def test_any_body(admin: httpx.AsyncClient, path: str, data: st.DataObject) -> None:
    body = copy.deepcopy(BODIES[path])
    for _ in range(data.draw(st.integers(0, 2))):
        *parents, last = data.draw(st.sampled_from(places(body)))
        inner = body
        for parent in parents:
            inner = inner[parent]
        if data.draw(st.booleans()):
            inner[last] = data.draw(values)
        else:
            del inner[last]
        if not body:
            break
    if data.draw(st.integers(0, 3)) == 0:
        body[data.draw(st.text(max_size=6))] = data.draw(values)
    content = json.dumps(body)
    reply = await admin.post(path, content=content, headers={"content-type": "application/json"})
    assert reply.status_code < 500, (content, reply.text)
    if reply.status_code >= 400:
        error = reply.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}, content
        assert error["message"], content
