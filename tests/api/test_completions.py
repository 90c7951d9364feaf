"""POST /v1/completions: text, shapes and counts, plain and streamed."""

from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest

from onebase_engine.text.tokenizer import TextCodec

Stream = Callable[..., Awaitable[list[dict[str, Any]]]]
PATH = "/v1/completions"
UNICODE = "the 👩‍👧 漢字 é\u0301 text, and \ufffd more"


async def complete(http: httpx.AsyncClient, **body: Any) -> dict[str, Any]:
    reply = await http.post(PATH, json=body)
    assert reply.status_code == 200, reply.text
    document: dict[str, Any] = reply.json()
    return document


def streamed_text(events: list[dict[str, Any]], index: int = 0) -> str:
    choices = [choice for event in events for choice in event["choices"] if choice["index"] == index]
    assert [choice["finish_reason"] for choice in choices[:-1]] == [None] * (len(choices) - 1)
    assert choices[-1]["finish_reason"] is not None
    return "".join(choice["text"] for choice in choices)


async def test_the_response(http: httpx.AsyncClient, codec: TextCodec) -> None:
    prompt = "the stop"
    tokens = len(codec.encode(prompt))
    document = await complete(http, model="tiny", prompt=prompt)
    assert document.pop("id").startswith("cmpl-")
    assert document.pop("created") > 1_700_000_000
    assert document == {
        "object": "text_completion",
        "model": "tiny",
        "system_fingerprint": "f00d",
        "choices": [{"index": 0, "text": prompt, "logprobs": None, "finish_reason": "stop", "stop_reason": None}],
        "usage": {
            "prompt_tokens": tokens,
            "completion_tokens": tokens + 1,  # the end-of-sequence token counts
            "total_tokens": 2 * tokens + 1,
            "prompt_tokens_details": {"cached_tokens": 3},
        },
    }


@pytest.mark.parametrize("at_once", [1, 2, 5, 1000])
@pytest.mark.parametrize("extra", [{}, {"stop": ["xt, a"]}, {"stop": "漢字 é"}, {"stop": "zzz"}, {"max_tokens": 9}])
async def test_streamed_text_is_the_plain_text(
    http: httpx.AsyncClient, events: Stream, engine: Any, at_once: int, extra: dict[str, Any]
) -> None:
    engine.tokens_at_once = at_once
    body = {"max_tokens": 100, **extra}
    plain = await complete(http, prompt=UNICODE, **body)
    chunks = await events(PATH, prompt=UNICODE, stream_options={"include_usage": True}, **body)
    *chunks, last = chunks
    assert streamed_text(chunks) == plain["choices"][0]["text"]
    assert chunks[-1]["choices"][0]["finish_reason"] == plain["choices"][0]["finish_reason"]
    assert last["choices"] == []
    assert last["usage"] == plain["usage"]
    assert {chunk["usage"] for chunk in chunks} == {None}
    assert len({chunk["id"] for chunk in [*chunks, last]}) == 1


async def test_usage_and_text_do_not_depend_on_how_tokens_arrive(http: httpx.AsyncClient, engine: Any) -> None:
    replies = []
    for engine.tokens_at_once in (1, 3, 1000):
        document = await complete(http, prompt=UNICODE, stop=["xt, a"], max_tokens=100)
        replies.append((document["choices"], document["usage"]))
    assert replies[0] == replies[1] == replies[2]
    assert replies[0][0][0]["stop_reason"] == "xt, a"
    assert len(engine.aborted) == 3 - 1  # with all in one output the engine had ended it itself


async def test_stop_string_is_kept_on_request(http: httpx.AsyncClient) -> None:
    document = await complete(http, prompt="the stop string", stop=["op"], include_stop_str_in_output=True)
    assert document["choices"][0]["text"] == "the stop"


async def test_length(http: httpx.AsyncClient, codec: TextCodec) -> None:
    document = await complete(http, prompt="the stop string", max_tokens=2)
    assert document["choices"][0]["finish_reason"] == "length"
    assert document["usage"]["completion_tokens"] == 2
    document = await complete(http, prompt="x" * 40)
    assert document["usage"]["completion_tokens"] == 16


async def test_stop_token_ids(http: httpx.AsyncClient, engine: Any, reply: Any) -> None:
    engine.reply = lambda request: reply([50, 51], stop_token=77)
    document = await complete(http, prompt="a", stop_token_ids=[77])
    assert document["choices"][0]["stop_reason"] == 77
    assert document["usage"]["completion_tokens"] == 3


async def test_prompts_in_all_shapes(http: httpx.AsyncClient, codec: TextCodec) -> None:
    one, two = codec.encode("the stop"), codec.encode("this text")
    for prompt, texts in [
        ("the stop", ["the stop"]),
        (["the stop", "this text"], ["the stop", "this text"]),
        (one, ["the stop"]),
        ([one, two], ["the stop", "this text"]),
    ]:
        document = await complete(http, prompt=prompt, n=2)
        assert [choice["index"] for choice in document["choices"]] == list(range(2 * len(texts)))
        assert [choice["text"] for choice in document["choices"]] == [t for t in texts for _ in range(2)]
        assert document["usage"]["prompt_tokens"] == sum(len(codec.encode(text)) for text in texts)
        assert document["usage"]["completion_tokens"] == 2 * sum(len(codec.encode(t)) + 1 for t in texts)


async def test_streaming_several_choices(events: Stream) -> None:
    chunks = await events(PATH, prompt=["the stop", "this text"], n=2)
    assert [streamed_text(chunks, index) for index in range(4)] == ["the stop"] * 2 + ["this text"] * 2


async def test_sampling_parameters_reach_the_engine(http: httpx.AsyncClient, engine: Any) -> None:
    await complete(http, prompt="a")
    defaults = engine.requests[-1].sampling
    assert (defaults.temperature, defaults.top_p, defaults.top_k, defaults.max_tokens) == (1.0, 1.0, 0, 16)
    given = {
        "temperature": 0,
        "top_p": 0.5,
        "top_k": 7,
        "min_p": 0.1,
        "presence_penalty": -1,
        "frequency_penalty": 1.5,
        "repetition_penalty": 1.2,
        "seed": 2**63 - 1,
        "min_tokens": 3,
        "max_tokens": 5,
        "ignore_eos": True,
        "stop_token_ids": [5, 6],
    }
    await complete(http, prompt="a", n=2, priority=-4, logit_bias={"7": -100, "8": 2.5}, user="me", **given)
    for request, seed in zip(engine.requests[-2:], (2**63 - 1, -(2**63)), strict=True):
        sampling = request.sampling
        expected = {**given, "seed": seed, "stop_token_ids": (5, 6), "logit_bias": {7: -100, 8: 2.5}}
        assert {name: getattr(sampling, name) for name in expected} == expected
        assert request.priority == -4
    await complete(http, prompt="a", top_k=-1, temperature=None, logit_bias=None, stop=None)
    assert engine.requests[-1].sampling == defaults


async def test_special_tokens(http: httpx.AsyncClient, engine: Any, codec: TextCodec) -> None:
    prompt = "<|im_start|>the"
    assert (await complete(http, prompt=prompt))["choices"][0]["text"] == "the"
    shown = await complete(http, prompt=prompt, skip_special_tokens=False)
    assert shown["choices"][0]["text"] == prompt


async def test_echo(http: httpx.AsyncClient, events: Stream, engine: Any, reply: Any, codec: TextCodec) -> None:
    engine.reply = lambda request: reply(codec.encode(" text"))
    for prompt in ("the é", codec.encode("the é")):
        document = await complete(http, prompt=prompt, echo=True)
        assert document["choices"][0]["text"] == "the é text"
        assert streamed_text(await events(PATH, prompt=prompt, echo=True)) == "the é text"


async def test_logprobs(http: httpx.AsyncClient, events: Stream, codec: TextCodec) -> None:
    tokens = codec.encode("the é")
    document = await complete(http, prompt="the é", logprobs=4)
    found = document["choices"][0]["logprobs"]
    words = [codec.token_text(token) for token in tokens]
    assert found["tokens"] == words
    assert words[-2:] == ["bytes:\\xc3", "bytes:\\xa9"]
    assert found["token_logprobs"] == [-0.5] * len(tokens)
    assert found["top_logprobs"][0] == {
        codec.token_text(tokens[0] + i): -9999.0 if i == 3 else -0.5 - i for i in range(4)
    }
    assert found["text_offset"] == [0, 2, 3, 4, 4]  # é is two tokens, and one character
    chunks = await events(PATH, prompt="the é", logprobs=4)
    parts = [choice["logprobs"] for chunk in chunks for choice in chunk["choices"] if choice["logprobs"]]
    for key, values in found.items():
        assert [value for part in parts for value in part[key]] == values
    chosen = await complete(http, prompt="the é", logprobs=0)
    assert chosen["choices"][0]["logprobs"]["top_logprobs"] is None


async def test_logprobs_of_an_echoed_prompt_only(http: httpx.AsyncClient, codec: TextCodec) -> None:
    """How evaluation harnesses score a text: echo, logprobs, max_tokens 0."""
    tokens = codec.encode("the stop")
    document = await complete(http, prompt="the stop", echo=True, logprobs=1, max_tokens=0)
    (choice,) = document["choices"]
    assert choice["text"] == "the stop"
    assert choice["logprobs"]["tokens"] == [codec.token_text(token) for token in tokens]
    assert choice["logprobs"]["token_logprobs"] == [None] + [-0.5] * (len(tokens) - 1)
    assert choice["logprobs"]["top_logprobs"][0] is None
    assert document["usage"]["completion_tokens"] == 0


async def test_logprobs_end_with_the_stop_string(http: httpx.AsyncClient, engine: Any, codec: TextCodec) -> None:
    engine.tokens_at_once = 100
    document = await complete(http, prompt="x1x2x3", logprobs=0, stop=["x2"])
    count = len(document["choices"][0]["logprobs"]["tokens"])
    assert count == document["usage"]["completion_tokens"] == len(codec.encode("x1x2"))


async def test_best_of_keeps_the_likeliest(http: httpx.AsyncClient, engine: Any, codec: TextCodec) -> None:
    tokens = {index: codec.encode("abcdef"[index]) for index in range(4)}
    chance = {0: -3.0, 1: -1.0, 2: -2.0, 3: -4.0}
    original = engine.generate

    async def generate(request: Any) -> Any:
        import msgspec

        index = int(request.id.rpartition("-")[2])
        async for output in original(msgspec.structs.replace(request, prompt=tuple(tokens[index]))):
            scored = [msgspec.structs.replace(entry, logprob=chance[index]) for entry in output.logprobs]
            yield msgspec.structs.replace(output, logprobs=tuple(scored))

    engine.generate = generate
    document = await complete(http, prompt="z", n=2, best_of=4)
    assert [choice["text"] for choice in document["choices"]] == ["b", "c"]
    assert [choice["index"] for choice in document["choices"]] == [0, 1]
    assert document["choices"][0]["logprobs"] is None
    assert document["usage"]["completion_tokens"] == 8


async def test_adapters_by_name(
    http: httpx.AsyncClient, engine: Any, services: Any, adapter_root: Any, new_adapter: Any
) -> None:
    folder = new_adapter(adapter_root / "a")
    entry = await services.adapters.register("team/a", lambda: services.store.stage(folder))
    document = await complete(http, prompt="a", model="team/a")
    assert document["model"] == "team/a"
    assert engine.requests[-1].adapter == entry.record.digest
    await complete(http, prompt="a")
    assert engine.requests[-1].adapter is None
