"""POST /v1/chat/completions: the template, the shapes, plain and streamed."""

from collections.abc import Awaitable, Callable
from typing import Any

import httpx

from onebase_engine.text.tokenizer import TextCodec

Stream = Callable[..., Awaitable[list[dict[str, Any]]]]
PATH = "/v1/chat/completions"
USER = [{"role": "user", "content": "hi"}]


async def chat(http: httpx.AsyncClient, **body: Any) -> dict[str, Any]:
    reply = await http.post(PATH, json={"messages": USER, **body})
    assert reply.status_code == 200, reply.text
    document: dict[str, Any] = reply.json()
    return document


async def test_the_response(http: httpx.AsyncClient, engine: Any, reply: Any, codec: TextCodec) -> None:
    engine.reply = lambda request: reply(codec.encode("hello é"))
    document = await chat(http, model="tiny")
    prompt = codec.encode("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n", add_special_tokens=False)
    assert list(engine.requests[-1].prompt) == prompt
    assert engine.requests[-1].sampling.max_tokens == engine.info.context - len(prompt)
    assert document.pop("id").startswith("chatcmpl-")
    document.pop("created")
    answer = len(codec.encode("hello é")) + 1
    assert document == {
        "object": "chat.completion",
        "model": "tiny",
        "system_fingerprint": "f00d",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "hello é", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
                "stop_reason": None,
            }
        ],
        "usage": {
            "prompt_tokens": len(prompt),
            "completion_tokens": answer,
            "total_tokens": len(prompt) + answer,
            "prompt_tokens_details": {"cached_tokens": 3},
        },
    }


async def test_streamed(http: httpx.AsyncClient, events: Stream, engine: Any, reply: Any, codec: TextCodec) -> None:
    engine.reply = lambda request: reply(codec.encode("hello 漢字, stop here"))
    body = {"messages": USER, "stop": ["stop"], "n": 2, "stream_options": {"include_usage": True}}
    *chunks, last = await events(PATH, **body)
    assert {chunk["object"] for chunk in [*chunks, last]} == {"chat.completion.chunk"}
    for index in range(2):
        choices = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
        assert choices[0]["delta"]["role"] == "assistant"
        assert all("role" not in choice["delta"] for choice in choices[1:])
        assert "".join(choice["delta"]["content"] for choice in choices) == "hello 漢字, "
        assert choices[-1]["finish_reason"] == "stop"
        assert choices[-1]["stop_reason"] == "stop"
    plain = await chat(http, stop=["stop"], n=2)
    assert plain["usage"] == last["usage"]
    assert [choice["message"]["content"] for choice in plain["choices"]] == ["hello 漢字, "] * 2


async def test_an_answer_without_text_still_has_a_role(events: Stream, engine: Any, reply: Any) -> None:
    engine.reply = lambda request: reply([])
    (only,) = await events(PATH, messages=USER)
    assert only["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert only["choices"][0]["finish_reason"] == "stop"


async def test_logprobs(http: httpx.AsyncClient, events: Stream, engine: Any, reply: Any, codec: TextCodec) -> None:
    tokens = codec.encode("é")
    engine.reply = lambda request: reply(tokens)
    document = await chat(http, logprobs=True, top_logprobs=2)
    found = document["choices"][0]["logprobs"]
    assert found["refusal"] is None
    assert [entry["bytes"] for entry in found["content"]] == [[0xC3], [0xA9]]
    assert found["content"][0]["token"] == "bytes:\\xc3"
    assert [alternative["logprob"] for alternative in found["content"][0]["top_logprobs"]] == [-0.5, -1.5]
    chunks = await events(PATH, messages=USER, logprobs=True, top_logprobs=2)
    parts = [choice["logprobs"] for chunk in chunks for choice in chunk["choices"] if choice["logprobs"]]
    assert [entry for part in parts for entry in part["content"]] == found["content"]
    document = await chat(http, logprobs=True)
    assert document["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []


async def test_messages_become_the_templates(http: httpx.AsyncClient, engine: Any, codec: TextCodec) -> None:
    messages = [
        {"role": "developer", "content": "be brief"},
        {
            "role": "user",
            "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}],
            "name": "x",
        },
        {"role": "assistant", "content": "yes", "refusal": None, "tool_calls": None},
        {"role": "user", "content": "go on"},
    ]
    await chat(http, messages=messages, max_tokens=5)
    assert codec.decode(engine.requests[-1].prompt) == (
        "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\none\ntwo<|im_end|>\n"
        "<|im_start|>assistant\nyes<|im_end|>\n<|im_start|>user\ngo on<|im_end|>\n<|im_start|>assistant\n"
    )
    assert engine.requests[-1].sampling.max_tokens == 5
    await chat(http, max_completion_tokens=6, add_generation_prompt=False)
    assert codec.decode(engine.requests[-1].prompt).endswith("<|im_end|>\n")
    assert engine.requests[-1].sampling.max_tokens == 6


async def test_values_that_ask_for_nothing_are_taken(http: httpx.AsyncClient) -> None:
    await chat(
        http,
        tools=None,
        tool_choice="none",
        response_format={"type": "text"},
        store=False,
        modalities=["text"],
        parallel_tool_calls=True,
        service_tier="auto",
    )
