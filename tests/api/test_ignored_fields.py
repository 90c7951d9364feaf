"""What cannot change an answer is accepted, and the reply's headers name it."""

from typing import Any

import httpx
import pytest

CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
USER = {"role": "user", "content": "a"}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("reasoning_content", "I should greet."),
        ("reasoning", "I should greet."),
        ("provider_specific_fields", {"refusal": None}),
        ("id", "msg_1"),
        ("annotations", [{"type": "url_citation"}]),
        ("cache_control", {"type": "ephemeral"}),
    ],
)
async def test_of_earlier_messages(http: httpx.AsyncClient, engine: Any, field: str, value: object) -> None:
    earlier = {"role": "assistant", "content": "b"}
    plain = await http.post(CHAT, json={"messages": [USER, earlier, USER]})
    assert "x-onebase-ignored" not in plain.headers
    reply = await http.post(CHAT, json={"messages": [USER, {**earlier, field: value}, USER]})
    assert (reply.status_code, reply.headers["x-onebase-ignored"]) == (200, field)
    first, second = engine.requests
    assert first.prompt == second.prompt


async def test_the_servers_own_answer_is_history(http: httpx.AsyncClient) -> None:
    """With all that clients add to it, null where there is nothing."""
    message = (await http.post(CHAT, json={"messages": [USER]})).json()["choices"][0]["message"]
    nothing = dict.fromkeys(("function_call", "audio", "annotations", "reasoning_content", "tool_calls", "images"))
    reply = await http.post(CHAT, json={"messages": [USER, {**nothing, **message}, USER]})
    assert reply.status_code == 200, reply.text
    assert "x-onebase-ignored" not in reply.headers


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, {"messages": [USER]}),
        (COMPLETIONS, {"prompt": "a"}),
        (RESPONSES, {"input": "a"}),
        ("/v1/embeddings", {"input": "a"}),
    ],
)
async def test_of_every_body(http: httpx.AsyncClient, path: str, body: dict[str, Any]) -> None:
    more = {
        "store": True,
        "prompt_cache_key": "k",
        "service_tier": "flex",
        "safety_identifier": "s",
        "unheard": None,
    }
    reply = await http.post(path, json={**body, **more})
    assert reply.status_code == 200, reply.text
    assert reply.headers["x-onebase-ignored"] == "store, prompt_cache_key, service_tier, safety_identifier"


async def test_hints_and_neutral_values(http: httpx.AsyncClient) -> None:
    hints = {"reasoning_effort": "low", "metadata": {"task": "x"}, "stream_options": {"include_obfuscation": False}}
    neutral = {
        "use_beam_search": False, "length_penalty": 1.0, "echo": False, "documents": None, "best_of": 1,
        "enable_thinking": False,
    }  # fmt: skip
    reply = await http.post(CHAT, json={"messages": [USER], **hints, **neutral})
    assert reply.status_code == 200, reply.text
    assert reply.headers["x-onebase-ignored"] == "reasoning_effort, metadata, include_obfuscation, stream_options"
    asked = {"input": "a", "truncation": "auto", "include": ["reasoning.encrypted_content"]}
    reply = await http.post(RESPONSES, json={**asked, "reasoning": {"effort": "low"}})
    assert (reply.status_code, reply.headers["x-onebase-ignored"]) == (200, "truncation, reasoning")


@pytest.mark.parametrize(("path", "asked"), [(CHAT, {"messages": [USER]}), (COMPLETIONS, {"prompt": "a"})])
async def test_as_many_tokens_as_fit(
    http: httpx.AsyncClient, engine: Any, path: str, asked: dict[str, Any]
) -> None:
    assert (await http.post(path, json={**asked, "max_tokens": -1})).status_code == 200
    (request,) = engine.requests
    assert len(request.prompt) + request.sampling.max_tokens == engine.info.context


async def test_a_text_that_is_gone_on_with(http: httpx.AsyncClient, engine: Any, codec: Any) -> None:
    begun = {"messages": [USER, {"role": "assistant", "content": "1, 2,"}], "continue_final_message": True}
    assert (await http.post(CHAT, json=begun)).status_code == 200
    assert codec.decode(engine.requests[0].prompt).endswith("1, 2,")
