"""The application in this process, without a socket."""

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import httpx
import pytest

from onebase_server.api.app import create_app
from onebase_server.api.services import Services

Events = list[dict[str, Any]]


@pytest.fixture
async def http(services: Services) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(create_app(services))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client


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
