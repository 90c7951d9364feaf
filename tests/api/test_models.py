"""/v1/models, /health, /ping, /version, /tokenize and /detokenize."""

from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from onebase_adapters.store.adapter_store import AdapterStore
from onebase_engine.text.tokenizer import TextCodec
from onebase_server.api.services import ApiSettings, Services

Make = Callable[..., Path]


async def add(services: Services, folder: Path, name: str) -> None:
    await services.adapters.register(name, lambda: services.store.stage(folder))


async def test_models_are_the_base_and_its_adapters(
    http: httpx.AsyncClient, services: Services, new_adapter: Make, tmp_path: Path
) -> None:
    await add(services, new_adapter(tmp_path / "b", b"b"), "team/b")
    await add(services, new_adapter(tmp_path / "a", b"a", virtual_tokens=20), "a")
    document = (await http.get("/v1/models")).json()
    assert document["object"] == "list"
    assert [model["id"] for model in document["data"]] == ["tiny", "a", "team/b"]
    base, first, second = document["data"]
    assert base == {
        "id": "tiny",
        "object": "model",
        "created": services.started,
        "owned_by": "onebase",
        "root": "tiny",
        "parent": None,
        "max_model_len": 512,
    }
    assert (first["parent"], first["root"], first["max_model_len"]) == ("tiny", "tiny", 492)
    assert second["max_model_len"] == 512
    for model in document["data"]:
        assert (await http.get(f"/v1/models/{model['id']}")).json() == model


async def test_an_unknown_model(http: httpx.AsyncClient) -> None:
    reply = await http.get("/v1/models/nobody")
    assert (reply.status_code, reply.json()["error"]["code"]) == (404, "model_not_found")


async def test_a_name_that_was_meant(
    http: httpx.AsyncClient, services: Services, new_adapter: Make, tmp_path: Path
) -> None:
    await add(services, new_adapter(tmp_path / "a", b"a"), "invoices")
    error = (await http.post("/v1/completions", json={"model": "invoice", "prompt": "a"})).json()["error"]
    assert "(did you mean 'invoices'?). This server has: tiny, invoices." in error["message"]


async def test_an_adapter_is_deleted_as_a_model(
    http: httpx.AsyncClient, services: Services, new_adapter: Make, tmp_path: Path, admin_key: str
) -> None:
    admin = {"authorization": f"Bearer {admin_key}"}
    await add(services, new_adapter(tmp_path / "a", b"a"), "a")
    assert (await http.delete("/v1/models/a", headers={"authorization": "Bearer wrong"})).status_code in (401, 403)
    reply = await http.delete("/v1/models/a", headers=admin)
    assert reply.json() == {"id": "a", "object": "model", "deleted": True}
    assert (await http.get("/v1/models/a")).status_code == 404
    assert (await http.delete("/v1/models/a", headers=admin)).status_code == 404
    assert (await http.delete("/v1/models/tiny", headers=admin)).status_code == 400


async def test_web_pages_from_elsewhere(
    engine: Any, codec: TextCodec, store: AdapterStore, in_process: Callable[..., httpx.AsyncClient]
) -> None:
    page = {"origin": "https://app.example"}
    settings = ApiSettings("tiny", allowed_origins=("https://app.example",))
    async with in_process(Services.over(engine, codec, store, settings)) as http:
        reply = await http.post("/v1/completions", json={"prompt": "a", "store": True}, headers=page)
        assert reply.headers["access-control-allow-origin"] == "https://app.example"
        assert "x-onebase-ignored" in reply.headers["access-control-expose-headers"]
        asked = {**page, "access-control-request-method": "POST", "access-control-request-headers": "authorization"}
        assert (await http.options("/v1/completions", headers=asked)).status_code == 200
        elsewhere = {"origin": "https://evil.example"}
        reply = await http.post("/v1/completions", json={"prompt": "a"}, headers=elsewhere)
        assert "access-control-allow-origin" not in reply.headers


async def test_health(http: httpx.AsyncClient, engine: Any) -> None:
    reply = await http.get("/health")
    assert reply.status_code == 200
    assert reply.json() == {
        "status": "ok",
        "model": "tiny",
        "adapters": 0,
        "engine": msgspec.to_builtins(engine.stats),
    }
    assert (await http.get("/ping")).status_code == 200
    engine.ready = False
    for path in ("/health", "/ping"):
        reply = await http.get(path)
        assert (reply.status_code, reply.headers["retry-after"]) == (503, "5")


async def test_version(http: httpx.AsyncClient) -> None:
    assert (await http.get("/version")).json() == {"version": version("onebase")}


async def test_tokenize(http: httpx.AsyncClient, codec: TextCodec) -> None:
    text = "the é <|im_end|>"
    reply = (await http.post("/tokenize", json={"model": "tiny", "prompt": text})).json()
    tokens = codec.encode(text)
    assert reply == {"count": len(tokens), "max_model_len": 512, "tokens": tokens, "token_strs": None}
    back = await http.post("/detokenize", json={"tokens": tokens})
    assert back.json() == {"prompt": text}
    assert (await http.post("/detokenize", json={"tokens": []})).json() == {"prompt": ""}
    named = (await http.post("/tokenize", json={"prompt": text, "return_token_strs": True})).json()
    assert named["token_strs"] == [codec.token_text(token) for token in tokens]


async def test_tokenize_is_what_a_chat_sends(http: httpx.AsyncClient, engine: Any) -> None:
    messages = [{"role": "user", "content": "hi"}]
    await http.post("/v1/chat/completions", json={"messages": messages})
    reply = (await http.post("/tokenize", json={"messages": messages})).json()
    assert reply["tokens"] == list(engine.requests[-1].prompt)
    shorter = (await http.post("/tokenize", json={"messages": messages, "add_generation_prompt": False})).json()
    assert shorter["tokens"] == reply["tokens"][: shorter["count"]]


async def test_a_long_text_is_tokenised_the_same(http: httpx.AsyncClient, codec: TextCodec) -> None:
    text = "the stop string " * 2000
    reply = (await http.post("/tokenize", json={"prompt": text})).json()
    assert reply["tokens"] == codec.encode(text)


@pytest.mark.parametrize(
    ("path", "body", "param", "message"),
    [
        ("/tokenize", {}, "prompt", "either prompt or messages"),
        (
            "/tokenize",
            {"prompt": "a", "messages": [{"role": "user", "content": "b"}]},
            "prompt",
            "either prompt or messages",
        ),
        ("/tokenize", {"prompt": 5}, "prompt", "valid string"),
        ("/tokenize", {"messages": []}, "messages", "at least 1 item"),
        ("/detokenize", {"tokens": [-1]}, "tokens[0]", "greater than or equal to 0"),
        ("/detokenize", {"tokens": [10_000]}, "tokens", "not in the vocabulary"),
        ("/detokenize", {"tokens": "abc"}, "tokens", "valid list"),
        ("/detokenize", {}, "tokens", "required"),
    ],
)
async def test_bad_bodies(
    http: httpx.AsyncClient, path: str, body: dict[str, Any], param: str, message: str
) -> None:
    reply = await http.post(path, json=body)
    error = reply.json()["error"]
    assert (reply.status_code, error["param"]) == (400, param), reply.text
    assert message in error["message"]


@pytest.mark.parametrize("path", ["/tokenize", "/detokenize"])
async def test_models_are_checked(http: httpx.AsyncClient, path: str) -> None:
    reply = await http.post(path, json={"model": "nobody", "prompt": "a"} if path == "/tokenize" else
                            {"model": "nobody", "tokens": [1]})  # fmt: skip
    assert reply.status_code == 404


async def test_the_openapi_document_knows_every_answer(http: httpx.AsyncClient) -> None:
    document = (await http.get("/openapi.json")).json()
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            (status,) = [status for status in operation["responses"] if status.startswith("2")]
            for kind, content in operation["responses"][status]["content"].items():
                assert kind != "application/json" or content["schema"].get("$ref"), (method, path)
            assert {"4XX", "5XX"} <= operation["responses"].keys(), (method, path)
