"""Keys: who may infer, and who may administer."""

import re
from collections.abc import AsyncIterator, Callable
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from onebase_adapters.store.adapter_store import AdapterStore
from onebase_engine.text.tokenizer import TextCodec
from onebase_server.api.services import ApiSettings, Services

INFERENCE = [
    ("POST", "/v1/completions", {"prompt": "a"}),
    ("POST", "/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
    ("GET", "/v1/models", None),
    ("GET", "/v1/models/tiny", None),
    ("POST", "/tokenize", {"prompt": "a"}),
    ("POST", "/detokenize", {"tokens": [5]}),
]
ADMINISTRATION = [
    ("GET", "/v1/adapters", None),
    ("GET", "/v1/adapters/a", None),
    ("DELETE", "/v1/adapters/a", None),
    ("POST", "/v1/adapters", {"name": "a", "path": "a"}),
]


@pytest.fixture
async def closed(
    engine: Any, codec: TextCodec, store: AdapterStore, in_process: Callable[..., httpx.AsyncClient]
) -> AsyncIterator[httpx.AsyncClient]:
    """A server that wants a key for everything."""
    settings = ApiSettings("tiny", admin_key="the admin", api_keys=("one", "two"))
    async with in_process(Services.over(engine, codec, store, settings)) as client:
        yield client


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


@pytest.mark.parametrize(("method", "path", "body"), INFERENCE)
async def test_inference_needs_one_of_the_keys(
    closed: httpx.AsyncClient, engine: Any, method: str, path: str, body: dict[str, Any] | None
) -> None:
    for headers, message in [
        ({}, "An API key is needed"),
        ({"authorization": "Basic one"}, "An API key is needed"),
        ({"authorization": "Bearer "}, "An API key is needed"),
        (bearer("three"), "Wrong API key"),
        (bearer("é"), "Wrong API key"),
    ]:
        encoded = {name: value.encode() for name, value in headers.items()}
        reply = await closed.request(method, path, json=body, headers=encoded)
        error = reply.json()["error"]
        assert (reply.status_code, error["type"], error["code"]) == (
            401,
            "authentication_error",
            "invalid_api_key",
        )
        assert reply.headers["www-authenticate"] == "Bearer"
        assert message in error["message"]
    assert not engine.requests
    for key in ("one", "two", "the admin"):
        reply = await closed.request(method, path, json=body, headers=bearer(key))
        assert reply.status_code == 200, reply.text


async def test_keys_are_tenants(closed: httpx.AsyncClient, engine: Any) -> None:
    for key in ("one", "one", "two"):
        await closed.post("/v1/completions", json={"prompt": "a"}, headers=bearer(key))
    first, again, other = [request.tenant for request in engine.requests]
    assert first == again != other
    assert "one" not in first


async def test_an_open_server_has_one_tenant(http: httpx.AsyncClient, engine: Any) -> None:
    for headers in ({}, bearer("whatever")):
        await http.post("/v1/completions", json={"prompt": "a"}, headers=headers)
    assert [request.tenant for request in engine.requests] == ["", ""]


@pytest.mark.parametrize(("method", "path", "body"), ADMINISTRATION)
async def test_administration_needs_the_admin_key(
    closed: httpx.AsyncClient, method: str, path: str, body: dict[str, Any] | None
) -> None:
    for headers in ({}, bearer("one"), bearer("the admin ")):
        reply = await closed.request(method, path, json=body, headers=headers)
        if headers == bearer("the admin "):
            assert reply.status_code in (200, 400, 404)  # surrounding space is no part of a key
        else:
            assert reply.status_code == 401, reply.text


@pytest.mark.parametrize(("method", "path", "body"), ADMINISTRATION)
async def test_without_an_admin_key_administration_is_closed(
    engine: Any,
    codec: TextCodec,
    store: AdapterStore,
    in_process: Callable[..., httpx.AsyncClient],
    method: str,
    path: str,
    body: dict[str, Any] | None,
) -> None:
    async with in_process(Services.over(engine, codec, store, ApiSettings("tiny")), key="") as http:
        reply = await http.request(method, path, json=body)
        assert (reply.status_code, reply.json()["error"]["code"]) == (403, "forbidden")
        assert "--admin-key" in reply.json()["error"]["message"]


async def test_health_needs_no_key(closed: httpx.AsyncClient) -> None:
    for path in ("/health", "/ping", "/version"):
        assert (await closed.get(path)).status_code == 200


async def test_the_page_of_the_document_loads_nothing_from_elsewhere(http: httpx.AsyncClient) -> None:
    page = (await http.get("/docs")).text
    named = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert len(named) == 3
    for name in (*named, "openapi.json"):
        assert f"{name}" in page
        assert not urlsplit(name).hostname
        reply = await http.get(f"/{name}")
        assert (reply.status_code, len(reply.content) > 500) == (200, True), name
    assert (await http.get("/redoc")).status_code == 404


async def test_the_document_says_which_key_opens_what(http: httpx.AsyncClient) -> None:
    """So that /docs can ask for it."""
    document = (await http.get("/openapi.json")).json()
    assert {*document["components"]["securitySchemes"]} == {"API key", "Admin key"}
    assert document["paths"]["/v1/completions"]["post"]["security"] == [{"API key": []}]
    assert document["paths"]["/v1/adapters"]["post"]["security"] == [{"Admin key": []}]
