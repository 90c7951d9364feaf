"""Streams over a real socket: how they end, what a client that leaves sets free, and text that does not depend on
how it is cut."""

import json
import socket
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from onebase_engine.text.tokenizer import TextCodec

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
BODIES = {COMPLETIONS: {"prompt": "abc"}, CHAT: {"messages": [{"role": "user", "content": "hi"}]}}
both = pytest.mark.parametrize("path", [COMPLETIONS, CHAT])


def read_events(text: str) -> list[Any]:
    """The documents of a whole stream; its last event must be [DONE]."""
    *events, done, rest = text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in events]


def wait_until(true: Callable[[], bool], what: str) -> None:
    for _ in range(500):
        if true():
            return
        time.sleep(0.01)
    raise AssertionError(f"not within 5 s: {what}")


@both
async def test_an_error_after_the_first_token_is_an_event(
    http: httpx.AsyncClient, engine: Any, reply: Any, path: str
) -> None:
    engine.reply = lambda request: reply([50, 51], finish_reason="error", error_kind="engine_died")
    answer = await http.post(path, json={**BODIES[path], "stream": True})
    assert answer.status_code == 200
    *chunks, last = read_events(answer.text)
    assert len(chunks) == 1
    assert chunks[0]["choices"][0]["finish_reason"] is None
    assert last == {"error": {"message": "It broke.", "type": "server_error", "param": None, "code": "engine_died"}}


@both
async def test_an_error_before_the_first_token_has_its_status(
    http: httpx.AsyncClient, engine: Any, reply: Any, path: str
) -> None:
    engine.reply = lambda request: reply([], finish_reason="error", error_kind="engine_died")
    answer = await http.post(path, json={**BODIES[path], "stream": True})
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
    assert answer.json()["error"]["code"] == "engine_died"


async def test_a_shutdown_is_an_event(http: httpx.AsyncClient, engine: Any, reply: Any) -> None:
    engine.reply = lambda request: reply([50, 51], finish_reason="abort")
    answer = await http.post(COMPLETIONS, json={"prompt": "a", "stream": True})
    assert read_events(answer.text)[-1]["error"]["code"] == "shutting_down"


async def test_a_failure_of_the_code_is_an_event_without_details(
    http: httpx.AsyncClient, engine: Any, caplog: pytest.LogCaptureFixture
) -> None:
    original = engine.generate

    async def generate(request: Any) -> Any:
        async for output in original(request):
            yield output
            raise ZeroDivisionError("a secret")

    engine.generate = generate
    answer = await http.post(COMPLETIONS, json={"prompt": "abc", "stream": True})
    assert read_events(answer.text)[-1]["error"]["code"] == "internal_error"
    assert "secret" not in answer.text
    assert "a secret" in caplog.text


async def test_one_failing_choice_ends_all(http: httpx.AsyncClient, engine: Any, reply: Any) -> None:
    def answer(request: Any) -> Any:
        if request.id.endswith("-1"):
            return reply([50], finish_reason="error", error_kind="internal")
        return reply([50] * 16)

    engine.reply = answer
    engine.delay = 0.005
    plain = await http.post(COMPLETIONS, json={"prompt": "a", "n": 3})
    assert plain.status_code == 500
    assert sorted(name[-2:] for name in engine.aborted) == ["-0", "-2"]


async def test_first_and_last_chunks_of_a_stream_with_usage(events: Any) -> None:
    *chunks, last = await events(COMPLETIONS, prompt="abc", stream_options={"include_usage": False})
    assert all("usage" not in chunk for chunk in [*chunks, last])
    assert last["choices"][0]["finish_reason"] == "stop"


def slow(engine: Any, reply: Any) -> None:
    engine.reply = lambda request: reply([50] * 400)
    engine.delay = 0.01


@both
def test_a_stream_that_is_left_is_aborted(live: str, engine: Any, reply: Any, path: str) -> None:
    slow(engine, reply)
    body = {**BODIES[path], "max_tokens": 300, "stream": True, "n": 3}
    with httpx.Client(base_url=live) as client, client.stream("POST", path, json=body) as answer:
        assert next(answer.iter_lines()).startswith("data: ")
    wait_until(lambda: len(engine.aborted) == 3, "three aborts")
    assert not engine.ended
    assert sorted(engine.aborted) == sorted(request.id for request in engine.requests)


@both
def test_a_plain_request_that_is_left_is_aborted(live: str, engine: Any, reply: Any, path: str) -> None:
    slow(engine, reply)
    body = {**BODIES[path], "max_tokens": 300}
    with httpx.Client(base_url=live) as client, pytest.raises(httpx.ReadTimeout):
        client.post(path, json=body, timeout=0.1)
    wait_until(lambda: len(engine.aborted) == 1, "an abort")
    assert not engine.ended


def test_half_a_request_does_no_harm(live: str, engine: Any) -> None:
    host, port = live.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            b'content-length: 100\r\n\r\n{"prompt"'
        )
    with httpx.Client(base_url=live) as client:
        assert client.post(COMPLETIONS, json={"prompt": "a"}).status_code == 200
    assert len(engine.requests) == 1


def test_many_streams_at_once_stay_apart(live: str, engine: Any, codec: TextCodec) -> None:
    import asyncio

    engine.delay = 0.001
    texts = [f"text {number} 漢字 {number * 7}" for number in range(40)]

    async def one(client: httpx.AsyncClient, text: str) -> str:
        answer = await client.post(COMPLETIONS, json={"prompt": text, "max_tokens": 200, "stream": True})
        return "".join(event["choices"][0]["text"] for event in read_events(answer.text))

    async def run() -> list[str]:
        async with httpx.AsyncClient(base_url=live, timeout=30) as client:
            return await asyncio.gather(*(one(client, text) for text in texts))

    assert asyncio.run(run()) == texts


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    text=st.text("abé漢 ", max_size=24),
    stops=st.lists(st.text("abé漢 c", min_size=1, max_size=4), max_size=2),
    at_once=st.integers(1, 9),
    max_tokens=st.integers(1, 30),
    min_tokens=st.integers(0, 8),
    include=st.booleans(),
)
async def test_a_stream_is_the_plain_answer_however_it_is_cut(
    http: httpx.AsyncClient, engine: Any, reply: Any, codec: TextCodec, text: str, stops: list[str], at_once: int,
    max_tokens: int, min_tokens: int, include: bool,
) -> None:  # fmt: skip
    tokens = codec.encode(text)
    engine.reply = lambda request: reply(tokens)
    body = {
        "max_tokens": max_tokens,
        "min_tokens": min(min_tokens, max_tokens),
        "stop": stops,
        "include_stop_str_in_output": include,
    }
    found = []
    for path, extra in ((COMPLETIONS, {"logprobs": 1}), (CHAT, {"logprobs": True})):
        for wanted in ({}, extra):
            asked = {**BODIES[path], **body, **wanted}
            engine.tokens_at_once = 1000
            plain = (await http.post(path, json=asked)).json()
            engine.tokens_at_once = at_once
            answer = await http.post(
                path, json={**asked, "stream": True, "stream_options": {"include_usage": True}}
            )
            *chunks, last = read_events(answer.text)
            choices = [chunk["choices"][0] for chunk in chunks]
            (whole,) = plain["choices"]
            if path == CHAT:
                expected = whole["message"]["content"]
                shown = "".join(choice["delta"]["content"] for choice in choices)
            else:
                expected, shown = whole["text"], "".join(choice["text"] for choice in choices)
            assert shown == expected
            assert last["usage"] == plain["usage"]
            assert (choices[-1]["finish_reason"], choices[-1]["stop_reason"]) == (
                whole["finish_reason"],
                whole["stop_reason"],
            )
            found.append((shown, whole["finish_reason"], plain["usage"]["completion_tokens"]))
    assert len(set(found)) == 1
