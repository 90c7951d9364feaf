"""The stock `openai` client against a real socket: the calls of its documentation, unchanged."""

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from onebase_engine.text.tokenizer import TextCodec

USER: Any = [{"role": "user", "content": "hi"}]


@pytest.fixture
def client(live: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{live}/v1", api_key="none", max_retries=0) as opened:
        yield opened


@pytest.fixture
def answer(engine: Any, reply: Any, codec: TextCodec) -> str:
    """What the engine generates for chats."""
    text = "hello 漢字 👩‍👧"
    engine.reply = lambda request: reply(codec.encode(text))
    return text


def test_completions(client: openai.OpenAI) -> None:
    made = client.completions.create(model="tiny", prompt="the stop é", max_tokens=50, temperature=0, seed=1)
    assert made.choices[0].text == "the stop é"
    assert made.choices[0].finish_reason == "stop"
    assert made.usage is not None
    assert made.usage.total_tokens == made.usage.prompt_tokens + made.usage.completion_tokens
    stream = client.completions.create(model="tiny", prompt="the stop é", max_tokens=50, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == "the stop é"


def test_completions_logprobs(client: openai.OpenAI) -> None:
    made = client.completions.create(model="tiny", prompt="the", echo=True, logprobs=2, max_tokens=1)
    logprobs = made.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.token_logprobs is not None
    assert logprobs.token_logprobs[0] is None
    assert logprobs.text_offset is not None
    assert logprobs.text_offset[0] == 0


def test_chat(client: openai.OpenAI, answer: str) -> None:
    made = client.chat.completions.create(model="tiny", messages=USER, logprobs=True, top_logprobs=2)
    assert made.choices[0].message.content == answer
    assert made.choices[0].message.role == "assistant"
    assert made.choices[0].logprobs is not None
    assert made.choices[0].logprobs.content is not None
    assert len(made.choices[0].logprobs.content[0].top_logprobs) == 2
    stream = client.chat.completions.create(
        model="tiny", messages=USER, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == answer
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].usage == made.usage


def test_the_streaming_helper_builds_the_whole_answer(client: openai.OpenAI, answer: str) -> None:
    with client.chat.completions.stream(model="tiny", messages=USER) as stream:
        for _ in stream:
            pass
        assert stream.get_final_completion().choices[0].message.content == answer


def test_many_at_once(live: str) -> None:
    async def run() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{live}/v1", api_key="none") as client:
            made = await asyncio.gather(
                *(client.completions.create(model="tiny", prompt=f"text {i}") for i in range(20))
            )
        return [one.choices[0].text for one in made]

    assert asyncio.run(run()) == [f"text {i}" for i in range(20)]


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "onebase"


def test_vllm_extras(client: openai.OpenAI, engine: Any) -> None:
    extras = {"ignore_eos": True, "min_tokens": 2, "stop_token_ids": [7], "top_k": 3}
    client.completions.create(model="tiny", prompt="a", max_tokens=5, extra_body=extras)
    sampling = engine.requests[-1].sampling
    assert (sampling.ignore_eos, sampling.min_tokens, sampling.stop_token_ids, sampling.top_k) == (True, 2, (7,), 3)


def test_errors_are_the_clients_own(client: openai.OpenAI, engine: Any, reply: Any) -> None:
    with pytest.raises(openai.NotFoundError, match="This server has: tiny") as missing:
        client.completions.create(model="nobody", prompt="a")
    assert missing.value.code == "model_not_found"
    assert missing.value.param == "model"
    with pytest.raises(openai.BadRequestError, match="temperature") as bad:
        client.completions.create(model="tiny", prompt="a", temperature=-1)
    assert bad.value.param == "temperature"
    engine.reply = lambda request: reply([50, 51], finish_reason="error", error_kind="engine_died")
    with pytest.raises(openai.APIError, match=r"It broke\."):
        list(client.completions.create(model="tiny", prompt="a", stream=True))


def test_retries_after_a_restart_of_the_engine(live: str, engine: Any) -> None:
    from onebase_server.engine_process.engine_client import EngineUnavailableError

    original, calls = engine.generate, []

    async def generate(request: Any) -> Any:
        calls.append(request)
        if len(calls) < 3:
            raise EngineUnavailableError("The engine is starting.", retry_after=0)
        async for output in original(request):
            yield output

    engine.generate = generate
    with openai.OpenAI(base_url=f"{live}/v1", api_key="none", max_retries=3) as client:
        for stream in (False, True):
            calls.clear()
            client.completions.create(model="tiny", prompt="a", stream=stream)
    assert len(calls) == 3


async def test_several_adapters_in_extra_body(
    client: openai.OpenAI, services: Any, engine: Any, tmp_path: Path, new_adapter: Callable[..., Path]
) -> None:
    for name in "ab":
        folder = new_adapter(tmp_path / name, name.encode())
        await services.adapters.register(name, lambda folder=folder: services.store.stage(folder))
    extra = {"adapters": [{"name": "a", "weight": 0.7}, {"name": "b"}]}

    def calls() -> None:
        completion = client.completions.create(model="tiny", prompt="the", extra_body=extra)
        chat = client.chat.completions.create(model="tiny", messages=USER, extra_body=extra)
        response = client.responses.create(model="tiny", input="hi", extra_body=extra)
        assert {completion.model, chat.model, response.model} == {"0.7 a + b"}
        with pytest.raises(openai.NotFoundError) as caught:
            client.completions.create(model="tiny", prompt="the", extra_body={"adapters": [{"name": "c"}]})
        assert caught.value.param == "adapters[0].name"

    await asyncio.to_thread(calls)
    assert [[part.name for part in request.parts] for request in engine.requests] == [["a", "b"]] * 3
