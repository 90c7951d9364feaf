"""Adapters that bring a chat template of their own: chats with them are written by it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from onebase_adapters.errors import AdapterFormatError
from onebase_adapters.store.adapter_store import AdapterStore
from onebase_engine.text.tokenizer import TextCodec
from onebase_server.api.services import ApiSettings, Services

CHAT = "/v1/chat/completions"
USER = {"role": "user", "content": "hi"}
OWN = "{% for m in messages %}### {{ m.role }}: {{ m.content }}\n{% endfor %}### assistant:"
WRITTEN = "### user: hi\n### assistant:"


def beside(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text(OWN)


def in_settings(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": OWN}))


def named(folder: Path) -> None:
    several = [{"name": "default", "template": OWN}, {"name": "rag", "template": "other"}]
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": several}))


async def register(services: Services, folder: Path, name: str) -> str:
    entry = await services.adapters.register(name, lambda: services.store.stage(folder))
    return entry.record.digest


async def prompt(http: httpx.AsyncClient, engine: Any, codec: TextCodec, **body: Any) -> str:
    reply = await http.post(CHAT, json={"messages": [USER], "max_tokens": 5, **body})
    assert reply.status_code == 200, reply.text
    return codec.decode(engine.requests[-1].prompt)


@pytest.mark.parametrize("bring", [beside, in_settings, named])
async def test_a_chat_is_written_by_it(
    http: httpx.AsyncClient, services: Services, engine: Any, codec: TextCodec, tmp_path: Path, new_adapter: Any,
    bring: Callable[[Path], None],
) -> None:  # fmt: skip
    folder = new_adapter(tmp_path / "a")
    plain = await register(services, folder, "plain")
    bring(folder)
    assert await register(services, folder, "own") != plain
    assert await prompt(http, engine, codec, model="own") == WRITTEN
    assert await prompt(http, engine, codec, model="plain") == codec.render_chat([USER])
    assert await prompt(http, engine, codec, adapters=[{"name": "own", "weight": 0.5}]) == WRITTEN
    document = (await http.post("/tokenize", json={"model": "own", "messages": [USER]})).json()
    assert codec.decode(document["tokens"]) == WRITTEN
    tool = {"type": "function", "function": {"name": "clock"}}
    told = await prompt(http, engine, codec, model="own", tools=[tool])
    assert told.startswith("### system: You can call functions.")


async def test_it_makes_chat_possible_on_a_base_that_has_none(
    engine: Any, codec: TextCodec, store: AdapterStore, tmp_path: Path, new_adapter: Any,
    in_process: Callable[..., httpx.AsyncClient],
) -> None:  # fmt: skip
    silent = TextCodec(codec.tokenizer)
    services = Services.over(engine, silent, store, ApiSettings("tiny"))
    beside(folder := new_adapter(tmp_path / "a"))
    await register(services, folder, "own")
    async with in_process(services) as http:
        assert await prompt(http, engine, codec, model="own") == WRITTEN
        reply = await http.post(CHAT, json={"messages": [USER]})
        assert "The base model has no chat template" in reply.json()["error"]["message"]


async def test_what_is_wrong_with_it_is_told(
    http: httpx.AsyncClient, services: Services, tmp_path: Path, new_adapter: Any
) -> None:
    for name, template in (("broken", "{% for %}"), ("refusing", "{{ raise_exception('never') }}"), ("other", OWN)):
        folder = new_adapter(tmp_path / name, name.encode())
        (folder / "chat_template.jinja").write_text(template)
        await register(services, folder, name)
        if name != "other":
            error = (await http.post(CHAT, json={"model": name, "messages": [USER]})).json()["error"]
            assert "The adapter's chat template refuses this" in error["message"]
    both = [{"name": "refusing"}, {"name": "other"}]
    error = (await http.post(CHAT, json={"adapters": both, "messages": [USER]})).json()["error"]
    assert (error["param"], "different chat templates" in error["message"]) == ("adapters", True)
    folder = new_adapter(tmp_path / "bytes")
    (folder / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(AdapterFormatError, match="no text in UTF-8"):
        await register(services, folder, "bytes")
    folder = new_adapter(tmp_path / "settings")
    (folder / "tokenizer_config.json").write_text('{"chat_template": "\\ud800"}')
    with pytest.raises(AdapterFormatError, match="is no text"):
        await register(services, folder, "settings")
