"""The application in this process, without a socket."""

import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest

from onebase_adapters.store.adapter_store import AdapterStore
from onebase_server.api.app import create_app
from onebase_server.api.services import Services

Events = list[dict[str, Any]]


def _in_process(services: Services, *, key: str | None = None) -> httpx.AsyncClient:
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    transport = httpx.ASGITransport(create_app(services))
    return httpx.AsyncClient(transport=transport, base_url="http://test", headers=headers)


@pytest.fixture
def in_process() -> Callable[..., httpx.AsyncClient]:
    """A client of an application over the given services."""
    return _in_process


@pytest.fixture
async def http(services: Services) -> AsyncIterator[httpx.AsyncClient]:
    async with _in_process(services) as client:
        yield client


@pytest.fixture
async def admin(services: Services) -> AsyncIterator[httpx.AsyncClient]:
    """As `http`, with the admin key."""
    async with _in_process(services, key=services.settings.admin_key) as client:
        yield client


@pytest.fixture
def store(tmp_path: Path) -> Iterator[AdapterStore]:
    """The store alone, for services of one's own."""
    with closing(AdapterStore(tmp_path / "store")) as opened:
        yield opened


@pytest.fixture
def events(http: httpx.AsyncClient) -> Callable[..., Awaitable[Events]]:
    """POST with stream: true; the documents of the events, [DONE] checked and left out."""

    async def post(path: str, **body: Any) -> Events:
        reply = await http.post(path, json={**body, "stream": True})
        assert reply.status_code == 200, reply.text
        assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
        lines = reply.text.split("\n\n")
        assert lines[-2:] == ["data: [DONE]", ""]
        assert all(line.startswith("data: ") for line in lines[:-1])
        return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]

    return post
