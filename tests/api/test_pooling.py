"""/v1/embeddings and /v1/classify."""

import asyncio
import base64
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from onebase_engine.text.tokenizer import TextCodec
from onebase_server.api.services import Services

LABELS = ["no", "yes", "perhaps"]


@pytest.fixture(autouse=True)
async def adapters(services: Services, tmp_path: Path, new_adapter: Callable[..., Path]) -> None:
    """`judge` labels texts, `tagger` tokens, `plain` nothing; `framed` labels texts with a template around."""
    for number, (name, config) in enumerate(
        {
            "plain": {},
            "judge": {"head": {"kind": "sequence", "labels": LABELS}},
            "tagger": {"head": {"kind": "token", "labels": LABELS}},
            "framed": {
                "head": {"kind": "token", "labels": LABELS},
                "template": {"before": "the text: ", "after": " end", "messages": []},
            },
        }.items()
    ):
        folder = new_adapter(tmp_path / name, bytes([number]), **config)
        await services.adapters.register(name, lambda folder=folder: services.store.stage(folder))  # type: ignore[misc]


async def post(http: httpx.AsyncClient, path: str, status: int = 200, **body: Any) -> dict[str, Any]:
    content = json.dumps(body)  # escaped, so that half a surrogate pair can be sent
    reply = await http.post(path, content=content, headers={"content-type": "application/json"})
    assert reply.status_code == status, reply.text
    document: dict[str, Any] = reply.json()
    return document


async def test_embeddings(http: httpx.AsyncClient, engine: Any, codec: TextCodec) -> None:
    one, two = codec.encode("the text"), codec.encode("é")
    for given in (["the text", "é"], [one, two]):
        document = await post(http, "/v1/embeddings", input=given, model="plain")
        assert document == {
            "object": "list",
            "data": [
                {"object": "embedding", "index": index, "embedding": [0.6, 0.8, len(tokens)]}
                for index, tokens in enumerate((one, two))
            ],
            "model": "plain",
            "usage": {"prompt_tokens": len(one + two), "total_tokens": len(one + two)},
        }
    assert {request.task for request in engine.requests} == {"embed"}
    assert engine.requests[-1].adapter is not None
    document = await post(http, "/v1/embeddings", input="é", encoding_format="base64")
    packed = base64.b64decode(document["data"][0]["embedding"])
    assert struct.unpack("<3f", packed) == pytest.approx((0.6, 0.8, len(two)))


def test_embeddings_of_the_stock_client(live: str) -> None:
    with openai.OpenAI(base_url=f"{live}/v1", api_key="none") as client:
        made = client.embeddings.create(model="tiny", input=["a", "b"])
        assert made.data[1].embedding[:2] == pytest.approx([0.6, 0.8])
        made = client.embeddings.create(model="tiny", input="a", encoding_format="float")
        assert made.data[0].embedding[:2] == [0.6, 0.8]


async def test_classification_of_texts(http: httpx.AsyncClient, codec: TextCodec) -> None:
    for path in ("/v1/classify", "/classify"):
        document = await post(http, path, input=["the text", "é"], model="judge")
        assert document.pop("id").startswith("classify-")
        document.pop("created")
        lengths = [len(codec.encode(text)) for text in ("the text", "é")]
        best = [length % 3 for length in lengths]
        assert document == {
            "object": "list",
            "model": "judge",
            "labels": LABELS,
            "data": [
                {
                    "index": index,
                    "label": LABELS[at],
                    "probs": [0.5 if number == at else 0.25 for number in range(3)],
                    "num_classes": 3,
                }
                for index, at in enumerate(best)
            ],
            "usage": {"prompt_tokens": sum(lengths), "total_tokens": sum(lengths)},
        }


async def test_classification_of_tokens(http: httpx.AsyncClient, codec: TextCodec, engine: Any) -> None:
    text = "the é 漢"
    document = await post(http, "/v1/classify", input=text, model="tagger")
    tokens = codec.encode(text)
    (found,) = document["data"]
    assert [entry["token"] for entry in found["tokens"]] == [codec.token_text(token) for token in tokens]
    assert [entry["label"] for entry in found["tokens"]] == [LABELS[token % 3] for token in tokens]
    assert (
        "".join(text[entry["start"] : entry["end"]] for entry in found["tokens"][:1])
        == "the"[: found["tokens"][0]["end"]]
    )
    assert found["tokens"][-1]["end"] == len(text)
    by_ids = await post(http, "/v1/classify", input=tokens, model="tagger")
    for entry, other in zip(found["tokens"], by_ids["data"][0]["tokens"], strict=True):
        assert other == {**entry, "start": None, "end": None}
    # Places are those of the input, whatever the adapter puts around it.
    framed = await post(http, "/v1/classify", input=text, model="framed")
    assert codec.decode(engine.requests[-1].prompt) == f"the text: {text} end"
    places = [(entry["start"], entry["end"]) for entry in framed["data"][0]["tokens"]]
    inside = [(start, end) for start, end in places if start < end]
    assert inside[0][0] == 0
    assert inside[-1][1] == len(text)
    assert len(inside) < len(places)


@pytest.mark.parametrize("path", ["/v1/classify", "/v1/embeddings"])
@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({}, "input", "required"),
        ({"input": ""}, "input", "empty"),
        ({"input": ["a", ""]}, "input[1]", "empty"),
        ({"input": [[99999]]}, "input", "not in the vocabulary"),
        ({"input": ["\ud800"]}, "input", "lone surrogate"),
        ({"input": ["a"] * 1025}, "input", "1,025 items, more than a request may have"),
        ({"input": [[5] * 513]}, "input", "512 tokens in all. This one has 513 in the prompt."),
        ({"input": "a", "truncate": True}, "truncate", "Unknown field"),
        ({"input": {"a": 1}}, "input", "must be a string"),
    ],
)
async def test_bad_bodies(
    http: httpx.AsyncClient, engine: Any, path: str, body: dict[str, Any], param: str, message: str
) -> None:
    error = (await post(http, path, 400, model="judge", **body))["error"]
    assert error["param"] == param, error
    assert message in error["message"]
    assert not engine.requests


async def test_what_cannot_be_done(http: httpx.AsyncClient, engine: Any) -> None:
    error = (await post(http, "/v1/classify", 400, model="plain", input="a"))["error"]
    assert (error["param"], error["message"]) == ("model", "The model 'plain' has no classification head.")
    assert (await post(http, "/v1/classify", 404, model="nobody", input="a"))["error"]["param"] == "model"
    asked = len(engine.requests)
    error = (await post(http, "/v1/embeddings", 400, input="a", dimensions=300))["error"]
    assert (error["param"], len(engine.requests)) == ("dimensions", asked)
    error = (await post(http, "/v1/embeddings", 400, input="a", encoding_format="int8"))["error"]
    assert error["param"] == "encoding_format"


@pytest.mark.parametrize("path", ["/v1/classify", "/v1/embeddings"])
async def test_one_failure_ends_all(http: httpx.AsyncClient, engine: Any, reply: Any, path: str) -> None:
    def answer(request: Any) -> Any:
        return reply([], error_kind="internal" if request.id.endswith("-1") else None)

    engine.reply = answer
    engine.delay = 0.01
    error = (await post(http, path, 500, input=["a", "b", "c"], model="judge"))["error"]
    assert error["message"] == "It broke."


def test_a_client_that_leaves(live: str, engine: Any) -> None:
    import time

    engine.delay = 5.0
    with httpx.Client(base_url=live) as client, pytest.raises(httpx.ReadTimeout):
        client.post("/v1/classify", json={"input": ["a", "b"], "model": "judge"}, timeout=0.1)
    for _ in range(200):
        if len(engine.aborted) == 2:
            break
        time.sleep(0.01)
    assert len(engine.aborted) == 2


async def test_many_at_once(http: httpx.AsyncClient, codec: TextCodec) -> None:
    texts = ["x" * (number % 7 + 1) for number in range(40)]
    documents = await asyncio.gather(
        *(post(http, "/v1/classify", input=[text, text], model="judge") for text in texts)
    )
    for text, document in zip(texts, documents, strict=True):
        assert [entry["label"] for entry in document["data"]] == [LABELS[len(codec.encode(text)) % 3]] * 2
