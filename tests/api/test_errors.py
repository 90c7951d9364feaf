"""Errors: OpenAI's shape, the field's name and the way out, wherever they come from."""

import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from onebase_adapters.store.adapter_store import AdapterStore
from onebase_engine.text.tokenizer import TextCodec
from onebase_server.api.services import ApiSettings, Services
from onebase_server.engine_process.engine_client import EngineUnavailableError, QueueFullError

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
USER = [{"role": "user", "content": "hi"}]


async def refused(
    http: httpx.AsyncClient, body: dict[str, Any] | bytes, path: str = COMPLETIONS, status: int = 400
) -> dict[str, Any]:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    reply = await http.post(path, content=content, headers={"content-type": "application/json"})
    assert reply.status_code == status, reply.text
    document = reply.json()
    assert set(document) == {"error"}
    assert set(document["error"]) == {"message", "type", "param", "code"}
    error: dict[str, Any] = document["error"]
    return error


@pytest.mark.parametrize(("path", "rest"), [(COMPLETIONS, {"prompt": "a"}), (CHAT, {"messages": USER})])
async def test_unknown_model(
    http: httpx.AsyncClient, services: Services, new_adapter: Any, tmp_path: Any, path: str, rest: dict[str, Any]
) -> None:
    folder = new_adapter(tmp_path / "a")
    await services.adapters.register("mine", lambda: services.store.stage(folder))
    error = await refused(http, {"model": "nobody", **rest}, path, 404)
    assert error["code"] == "model_not_found"
    assert error["param"] == "model"
    assert error["message"] == "The model 'nobody' does not exist. This server has: tiny, mine."


async def test_a_long_list_of_models_is_cut(
    http: httpx.AsyncClient, services: Services, new_adapter: Any, tmp_path: Any
) -> None:
    folder = new_adapter(tmp_path / "a")
    for number in range(10):
        await services.adapters.register(f"m{number}", lambda: services.store.stage(folder))
    error = await refused(http, {"model": "x" * 1000, "prompt": "a"}, status=404)
    assert error["message"].endswith("tiny, m0, m1, m2, m3, m4, m5, m6 and 3 more.")
    assert len(error["message"]) < 400


async def test_too_long_a_prompt_names_both_numbers(http: httpx.AsyncClient, codec: TextCodec) -> None:
    prompt = codec.encode("the") * 600
    error = await refused(http, {"prompt": prompt, "max_tokens": 7})
    assert (error["param"], error["code"]) == ("prompt", "context_length_exceeded")
    assert error["message"] == (
        f"A request may have 512 tokens in all. This one has {len(prompt)} in the prompt and 7 for the completion."
    )
    error = await refused(http, {"prompt": ["a", prompt_text(600)]})
    assert error["param"] == "prompt[1]"
    error = await refused(http, {"messages": [{"role": "user", "content": prompt_text(600)}]}, CHAT)
    assert (error["param"], error["code"]) == ("messages", "context_length_exceeded")
    assert "no room is left for the completion" in error["message"]


def prompt_text(length: int) -> str:
    return "\t" * length


async def test_an_adapters_own_tokens_count(
    http: httpx.AsyncClient, services: Services, new_adapter: Any, tmp_path: Any, codec: TextCodec
) -> None:
    folder = new_adapter(tmp_path / "a", virtual_tokens=20)
    await services.adapters.register("mine", lambda: services.store.stage(folder))
    token = codec.encode("a")
    reply = await http.post(COMPLETIONS, json={"model": "mine", "prompt": token * 490, "max_tokens": 2})
    assert reply.status_code == 200
    error = await refused(http, {"model": "mine", "prompt": token * 490, "max_tokens": 3})
    assert "20 of them are the adapter's" in error["message"]
    await http.post(CHAT, json={"model": "mine", "messages": USER})


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        (b"", None, "no body"),
        (b"{", None, "not valid JSON"),
        (b'{"prompt": "a",}', None, "not valid JSON"),
        (b"\xff\xfe", None, ""),
        (b"[" * 100_000, None, ""),
        (b"[1, 2]", None, "must be a JSON object"),
        (b'"text"', None, "must be a JSON object"),
        (b"null", None, "must be a JSON object"),
        (b"{}", "prompt", "Field 'prompt' is required."),
        (b'{"prompt": "a", "n": ' + b"9" * 5000 + b"}", None, ""),
        (b'{"prompt": "\\ud800"}', "prompt", "surrogate"),
        (b'{"prompt": "a", "stop": "\\udfff"}', "stop[0]", "unicode"),
        (b'{"prompt": "a", "temperature": NaN}', "temperature", "less than or equal to 100"),
        (b'{"prompt": "a", "temperature": Infinity}', "temperature", "less than or equal to 100"),
        (b'{"prompt": "a", "logit_bias": {"1": NaN}}', "logit_bias[1]", ""),
        ({"prompt": ""}, "prompt", "empty"),
        ({"prompt": []}, "prompt", "must be a string"),
        ({"prompt": [1, "a"]}, "prompt", "must be a string"),
        ({"prompt": [[]]}, "prompt", "empty"),
        ({"prompt": [-1]}, "prompt", "must be a string"),
        ({"prompt": [10_000]}, "prompt", "Token 10000 is not in the vocabulary"),
        ({"prompt": {"a": 1}}, "prompt", "must be a string"),
        ({"prompt": "a", "max_tokens": "7"}, "max_tokens", "valid integer"),
        ({"prompt": "a", "max_tokens": 7.5}, "max_tokens", "valid integer"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens", "at least 1"),
        ({"prompt": "a", "max_tokens": -2}, "max_tokens", "greater than or equal to -1"),
        ({"prompt": "a", "max_tokens": True}, "max_tokens", "valid integer"),
        ({"prompt": "a", "temperature": -0.1}, "temperature", "greater than or equal to 0"),
        ({"prompt": "a", "temperature": "hot"}, "temperature", "valid number"),
        ({"prompt": "a", "top_p": 0}, "top_p", "greater than 0"),
        ({"prompt": "a", "top_p": 1.1}, "top_p", "less than or equal to 1"),
        ({"prompt": "a", "presence_penalty": 3}, "presence_penalty", "less than or equal to 2"),
        ({"prompt": "a", "n": 0}, "n", "greater than or equal to 1"),
        ({"prompt": "a", "n": 129}, "n", "less than or equal to 128"),
        ({"prompt": ["a"] * 20, "n": 100}, "prompt", "more than 1024 sequences"),
        ({"prompt": "a", "n": 3, "best_of": 2}, "best_of", "less than n"),
        ({"prompt": "a", "best_of": 2, "stream": True}, "best_of", "cannot be streamed"),
        ({"prompt": "a", "logprobs": 21}, "logprobs", "less than or equal to 20"),
        ({"prompt": "a", "logprobs": True}, "logprobs", "valid integer"),
        ({"prompt": "a", "stop": [""]}, "stop[0]", "at least 1 character"),
        ({"prompt": "a", "stop": 5}, "stop", "valid list"),
        ({"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias", "token ids"),
        ({"prompt": "a", "logit_bias": {"1": 101}}, "logit_bias[1]", "less than or equal to 100"),
        ({"prompt": "a", "logit_bias": {"99999": 1}}, "logit_bias", "not in the vocabulary"),
        ({"prompt": "a", "stop_token_ids": [99999]}, "stop_token_ids", "not in the vocabulary"),
        ({"prompt": "a", "min_tokens": 20}, "min_tokens", "more than max_tokens (16)"),
        ({"prompt": "a", "stream": True, "stream_options": {"x": 1}}, "stream_options.x", "Unknown field"),
        (
            {"prompt": "a", "temprature": 1},
            "temprature",
            "Unknown field 'temprature' (did you mean 'temperature'?).",
        ),
        ({"prompt": "a", "x1": 1, "x2": 2, "x3": 3, "x4": 4}, "x1", "Unknown fields 'x1', 'x2', 'x3', 'x4'."),
        ({"prompt": "a", "use_beam_search": True}, "use_beam_search", "use_beam_search is not supported"),
        ({"prompt": "a", "length_penalty": 0.5}, "length_penalty", "there is no beam search"),
        ({"prompt": "a", "suffix": "b"}, "suffix", "suffix is not supported: the base model does not fill"),
    ],
)
async def test_bad_completions(
    http: httpx.AsyncClient, engine: Any, body: dict[str, Any] | bytes, param: str | None, message: str
) -> None:
    error = await refused(http, body)
    assert (error["param"], error["type"]) == (param, "invalid_request_error"), error
    assert message in error["message"]
    assert not engine.requests


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({}, "messages", "Field 'messages' is required."),
        ({"messages": []}, "messages", "at least 1 item"),
        ({"messages": "hi"}, "messages", "valid list"),
        ({"messages": [{"role": "user"}]}, "messages[0]", "content is required"),
        (
            {
                "messages": [
                    {"role": "user", "content": "a", "tool_calls": []},
                    {
                        "role": "user",
                        "content": "a",
                        "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}],
                    },
                ]
            },
            "messages[1]",
            "has no tool_calls",
        ),
        ({"messages": [{"content": "a"}]}, "messages[0].role", "required"),
        ({"messages": [{"role": "robot", "content": "a"}]}, "messages[0].role", "'user'"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "valid string"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content",
            "image_url",
        ),
        ({"messages": [{"role": "user", "content": "a", "x": 1}]}, "messages[0].x", "Unknown field"),
        ({"messages": [*USER, {"role": "system", "content": "a"}]}, "messages", "system must be first"),
        ({"messages": USER, "max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"messages": USER, "max_tokens": 3, "max_completion_tokens": 4}, "max_tokens", "differ"),
        ({"messages": USER, "top_logprobs": 3}, "top_logprobs", "needs logprobs"),
        ({"messages": USER, "chat_template_kwargs": {"messages": []}}, "chat_template_kwargs", "may not set"),
        ({"messages": USER, "chat_template": "x"}, "chat_template", "is not supported"),
        ({"messages": USER, "audio": {"voice": "x"}}, "audio", "audio is not supported"),
        ({"messages": USER, "modalities": ["text", "audio"]}, "modalities", "is not supported"),
        (
            {"messages": USER, "continue_final_message": True},
            "continue_final_message",
            "needs a text of the assistant's as the last message",
        ),
        (
            {
                "messages": [*USER, {"role": "assistant", "content": "b"}],
                "continue_final_message": True,
                "add_generation_prompt": True,
            },
            "add_generation_prompt",
            "goes with add_generation_prompt: false",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "x": 1}]}]},
            "messages[0].content",
            "part 0 has an unknown field 'x'",
        ),
        ({"messages": USER, "enable_thinking": True}, "enable_thinking", "use chat_template_kwargs"),
        ({"messages": USER, "functions": [{"name": "f"}]}, "functions", "is not supported"),
        ({"messages": USER, "web_search_options": {}}, "web_search_options", "is not supported"),
        ({"messages": USER, "prediction": {"type": "content"}}, "prediction", "is not supported"),
    ],
)
async def test_bad_chats(
    http: httpx.AsyncClient, engine: Any, body: dict[str, Any], param: str, message: str
) -> None:
    error = await refused(http, body, CHAT)
    assert error["param"] == param, error
    assert message in error["message"]
    assert not engine.requests


async def test_a_wrong_content_type(http: httpx.AsyncClient) -> None:
    reply = await http.post(COMPLETIONS, content=b'{"prompt": "a"}', headers={"content-type": "text/plain"})
    assert reply.status_code == 400
    assert "application/json" in reply.json()["error"]["message"]


async def test_unknown_paths_and_methods(http: httpx.AsyncClient) -> None:
    reply = await http.post("/v1/nothing")
    assert (reply.status_code, reply.json()["error"]["code"]) == (404, "not_found")
    reply = await http.get(COMPLETIONS)
    assert (reply.status_code, reply.json()["error"]["code"]) == (405, "method_not_allowed")


async def test_a_base_without_a_template(
    engine: Any, codec: TextCodec, store: AdapterStore, in_process: Any
) -> None:
    services = Services.over(engine, TextCodec(codec.tokenizer), store, ApiSettings("tiny"))
    async with in_process(services) as http:
        error = await refused(http, {"messages": USER}, CHAT)
        assert "no chat template: write the prompt out, and ask for a completion" in error["message"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (EngineUnavailableError("The engine is starting.", retry_after=7), 503, "engine_unavailable"),
        (QueueFullError("12 requests are in flight already.", retry_after=7), 429, "queue_full"),
    ],
)
async def test_no_engine_and_no_room(
    http: httpx.AsyncClient, engine: Any, error: Exception, status: int, code: str, stream: bool
) -> None:
    engine.raises = error
    reply = await http.post(COMPLETIONS, json={"prompt": "a", "stream": stream})
    assert (reply.status_code, reply.headers["retry-after"]) == (status, "7")
    assert reply.json()["error"] | {"type": ""} == {"message": str(error), "type": "", "param": None, "code": code}


@pytest.mark.parametrize(
    ("kind", "status", "retry_after"),
    [
        ("too_large", 400, None),
        ("adapter", 400, None),
        ("engine_died", 503, "5"),
        ("out_of_memory", 503, "1"),
        ("internal", 500, None),
    ],
)
async def test_bad_endings(
    http: httpx.AsyncClient, engine: Any, reply: Any, kind: str, status: int, retry_after: str | None
) -> None:
    engine.reply = lambda request: reply([5, 6], finish_reason="error", error_kind=kind)
    answer = await http.post(COMPLETIONS, json={"prompt": "a"})
    assert (answer.status_code, answer.headers.get("retry-after")) == (status, retry_after)
    assert answer.json()["error"]["code"] == kind
    assert answer.json()["error"]["message"] == "It broke."


async def test_a_failure_of_the_code_is_a_500_without_details(
    http: httpx.AsyncClient, engine: Any, caplog: pytest.LogCaptureFixture
) -> None:
    engine.raises = ZeroDivisionError("a secret")
    reply = await http.post(COMPLETIONS, json={"prompt": "a"}, headers={"x-request-id": "mine-1"})
    assert reply.status_code == 500
    assert "secret" not in reply.text
    assert reply.json()["error"]["type"] == "server_error"
    assert reply.headers["x-request-id"] == "mine-1"
    assert "a request failed: POST /v1/completions" in caplog.text


async def test_request_ids(http: httpx.AsyncClient) -> None:
    given = await http.get("/version", headers={"x-request-id": "a.b-C:1_2"})
    assert given.headers["x-request-id"] == "a.b-C:1_2"
    made = {(await http.get("/version")).headers["x-request-id"] for _ in range(3)}
    assert len(made) == 3
    for bad in ("", "a b", "x" * 200, "a;b"):
        reply = await http.get("/version", headers={"x-request-id": bad})
        assert reply.headers["x-request-id"] not in (bad, "")


async def test_a_body_over_the_limit(
    engine: Any, codec: TextCodec, store: AdapterStore, in_process: Callable[..., httpx.AsyncClient]
) -> None:
    services = Services.over(engine, codec, store, ApiSettings("tiny", max_body_bytes=1000))
    async with in_process(services) as http:
        error = await refused(http, {"prompt": "a" * 1000}, status=413)
        assert error["message"] == "The body is larger than 1000 bytes."

        # Without a length in front, too.
        async def pieces() -> Any:
            for _ in range(20):
                yield b" " * 100

        reply = await http.post(COMPLETIONS, content=pieces(), headers={"content-type": "application/json"})
        assert reply.status_code == 413, reply.text
        error = await refused(http, {"prompt": ""})
        assert "empty" in error["message"]
