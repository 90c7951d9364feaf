"""`adapters`: several for one request, in every endpoint that runs something."""

import hashlib
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from onebase_engine.request import Part
from onebase_engine.text.tokenizer import TextCodec
from onebase_server.api.services import Services

ADAPTERS: dict[str, dict[str, Any]] = {
    "a": {},
    "b": {},
    "soft": {"virtual_tokens": 7},
    "judge": {"head": {"kind": "sequence", "labels": ["no", "yes"]}},
    "outer": {"template": {"before": "<", "after": ">", "messages": [{"role": "system", "content": "be brief"}]}},
    "inner": {"template": {"before": "(", "after": ")", "messages": [{"role": "user", "content": "2+2"}]}},
}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "why"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "why"}]},
    "/v1/responses": {"input": "why"},
    "/v1/embeddings": {"input": "why"},
}
BOTH = [{"name": "a", "weight": 0.7}, {"name": "b", "weight": 0.3}]


@pytest.fixture(autouse=True)
async def digests(services: Services, tmp_path: Path, new_adapter: Callable[..., Path]) -> dict[str, str]:
    """The registered adapters' digests, by name."""
    found = {}
    for name, config in ADAPTERS.items():
        folder = new_adapter(tmp_path / name, name.encode(), **config)
        entry = await services.adapters.register(name, lambda folder=folder: services.store.stage(folder))  # type: ignore[misc]
        found[name] = entry.record.digest
    return found


async def ask(http: httpx.AsyncClient, path: str = "/v1/completions", **body: Any) -> dict[str, Any]:
    reply = await http.post(path, json={**BODIES.get(path, {}), **body})
    assert reply.status_code == 200, reply.text
    document: dict[str, Any] = reply.json()
    return document


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("model", [None, "tiny"])
async def test_every_endpoint_sends_the_parts(
    http: httpx.AsyncClient, engine: Any, digests: dict[str, str], path: str, model: str | None
) -> None:
    document = await ask(http, path, model=model, adapters=BOTH)
    assert document["model"] == "0.7 a + 0.3 b"
    request = engine.requests[-1]
    assert request.parts == (Part(digests["a"], 0.7, "a"), Part(digests["b"], 0.3, "b"))
    assert request.loaded == (digests["a"], digests["b"])


async def test_a_stream(http: httpx.AsyncClient, events: Callable[..., Awaitable[list[dict[str, Any]]]]) -> None:
    chunks = await events("/v1/completions", prompt="why", adapters=BOTH)
    assert {chunk["model"] for chunk in chunks} == {"0.7 a + 0.3 b"}
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "why"


async def test_a_compositions_digest_is_that_of_its_parts(
    http: httpx.AsyncClient, engine: Any, digests: dict[str, str]
) -> None:
    for adapters in (BOTH, [{"name": "a@1", "weight": 0.7}, {"name": "tiny:b", "weight": 0.3}], BOTH[::-1]):
        await ask(http, adapters=adapters)
    first, same, other = (request.adapter for request in engine.requests)
    assert first == same
    assert first != other, "the order decides how ranks lie"
    await ask(http, adapters=[{"name": "a", "weight": 0.7}, {"name": "b", "weight": 0.30000001}])
    assert len({request.adapter for request in engine.requests}) == 3
    assert first not in digests.values()
    assert len(first) == len(hashlib.sha256().hexdigest())


async def test_one_adapter_as_it_is_is_no_composition(
    http: httpx.AsyncClient, engine: Any, digests: dict[str, str]
) -> None:
    document = await ask(http, adapters=[{"name": "a"}])
    assert document["model"] == "a"
    assert (engine.requests[-1].adapter, engine.requests[-1].parts) == (digests["a"], ())
    await ask(http, adapters=[{"name": "a", "weight": 0.5}])
    assert engine.requests[-1].parts == (Part(digests["a"], 0.5, "a"),)


async def test_texts_are_nested_and_never_reach_the_engine(
    http: httpx.AsyncClient, engine: Any, codec: TextCodec, digests: dict[str, str]
) -> None:
    def prompt() -> str:
        return codec.decode(engine.requests[-1].prompt)

    texts = [{"name": "outer"}, {"name": "inner"}]
    document = await ask(http, adapters=texts)
    assert document["model"] == "outer + inner"
    assert prompt() == "<(why)>"
    assert (engine.requests[-1].adapter, engine.requests[-1].parts) == (None, ())
    await ask(http, adapters=[*texts, {"name": "a"}])
    assert (engine.requests[-1].adapter, engine.requests[-1].parts) == (digests["a"], ())
    await ask(http, adapters=[texts[1], BOTH[0], texts[0], BOTH[1]])
    assert prompt() == "(<why>)"
    assert [part.name for part in engine.requests[-1].parts] == ["a", "b"]
    await ask(http, "/v1/chat/completions", adapters=texts)
    turns = [("system", "be brief"), ("user", "2+2"), ("user", "why")]
    assert prompt() == codec.render_chat([{"role": role, "content": text} for role, text in turns])
    tokens = (await ask(http, "/tokenize", prompt="why", adapters=texts))["tokens"]
    assert codec.decode(tokens) == "<(why)>"


async def test_a_head_and_virtual_tokens_of_the_parts(http: httpx.AsyncClient) -> None:
    parts = [{"name": "judge"}, {"name": "a", "weight": 0.5}]
    document = await ask(http, "/v1/classify", input="why", adapters=parts)
    assert document["labels"] == ["no", "yes"]
    room = {"prompt": [5] * 500, "max_tokens": 12}
    await ask(http, adapters=BOTH, **room)
    reply = await http.post("/v1/completions", json={"adapters": [{"name": "soft"}, *BOTH], **room})
    assert reply.status_code == 400
    assert reply.json()["error"]["code"] == "context_length_exceeded"
    reply = await http.post("/v1/classify", json={"input": "why", "adapters": BOTH})
    assert reply.json()["error"]["param"] == "model"


WRONG: dict[str, tuple[Any, int, str]] = {
    "nobody": ([{"name": "nobody"}], 404, "adapters[0].name"),
    "no version": ([{"name": "a"}, {"name": "b@7"}], 404, "adapters[1].name"),
    "the base": ([{"name": "tiny"}], 400, "adapters[0].name"),
    "twice": ([{"name": "a"}, {"name": "a", "weight": 2}], 400, "adapters[1].name"),
    "twice by version": ([{"name": "a"}, {"name": "b"}, {"name": "a@1"}], 400, "adapters[2].name"),
    "no weight": ([{"name": "a"}, {"name": "b", "weight": 0}], 400, "adapters[1].weight"),
    "too heavy": ([{"name": "a", "weight": 101}], 400, "adapters[0].weight"),
    "a word": ([{"name": "a", "weight": "1"}], 400, "adapters[0].weight"),
    "a text's weight": ([{"name": "outer", "weight": 0.5}], 400, "adapters[0].weight"),
    "none": ([], 400, "adapters"),
    "too many": ([{"name": "a"}] * 9, 400, "adapters"),
    "another field": ([{"name": "a", "scale": 1}], 400, "adapters[0].scale"),
    "no name": ([{"weight": 1}], 400, "adapters[0].name"),
    "names alone": (["a", "b"], 400, "adapters[0]"),
}


@pytest.mark.parametrize("case", WRONG)
async def test_wrong_adapters(http: httpx.AsyncClient, engine: Any, case: str) -> None:
    adapters, status, field = WRONG[case]
    for path, body in BODIES.items():
        reply = await http.post(path, json={**body, "adapters": adapters})
        assert (reply.status_code, reply.json()["error"]["param"]) == (status, field), (path, reply.text)
    assert not engine.requests


async def test_a_weight_that_is_no_number(http: httpx.AsyncClient) -> None:
    for number in ("NaN", "Infinity", "-Infinity", "1e999"):
        content = f'{{"prompt": "why", "adapters": [{{"name": "a", "weight": {number}}}]}}'
        reply = await http.post("/v1/completions", content=content, headers={"content-type": "application/json"})
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, "adapters[0].weight"), number


async def test_with_adapters_model_is_the_base(http: httpx.AsyncClient) -> None:
    for model, status in (("a", 400), ("nobody", 404)):
        reply = await http.post("/v1/completions", json={"prompt": "why", "model": model, "adapters": BOTH})
        assert (reply.status_code, reply.json()["error"]["param"]) == (status, "model")


@pytest.mark.parametrize("stream", [False, True])
async def test_what_the_engine_cannot_compose(
    http: httpx.AsyncClient, engine: Any, reply: Any, stream: bool
) -> None:
    engine.reply = lambda _: reply((), "error", None, "composition")
    answer = await http.post("/v1/completions", json={"prompt": "why", "adapters": BOTH, "stream": stream})
    assert answer.status_code == 400
    assert answer.json()["error"] == {
        "message": "It broke.", "type": "invalid_request_error", "param": "adapters", "code": "composition",
    }  # fmt: skip


async def test_compositions_share_a_label(http: httpx.AsyncClient) -> None:
    for weight in range(1, 4):
        await ask(http, adapters=[{"name": "a", "weight": weight}, {"name": "outer"}])
    await ask(http, adapters=[{"name": "inner"}, {"name": "outer"}])
    metrics = (await http.get("/metrics")).text
    assert 'request_success_total{adapter="composed",finished_reason="stop",model_name="tiny"} 4.0' in metrics
