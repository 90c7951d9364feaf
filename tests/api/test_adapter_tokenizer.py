"""An adapter that brings another tokenizer is a 4xx with the reason, however it comes."""

import json
from collections.abc import Callable
from pathlib import Path

import httpx

from onebase_server.api.services import Services

Make = Callable[..., Path]


async def test_by_path_and_by_upload(
    admin: httpx.AsyncClient, adapter_root: Path, new_adapter: Make, services: Services
) -> None:
    own = services.codec.tokenizer.get_vocab()
    folder = new_adapter(adapter_root / "a")
    (folder / "added_tokens.json").write_text(json.dumps({"<|tool|>": len(own) - 1}))
    by_path = await admin.post("/v1/adapters", json={"name": "a", "path": "a"})
    names = ("adapter_config.json", "adapter_model.safetensors", "added_tokens.json")
    files = [("files", (name, (folder / name).read_bytes())) for name in names]
    uploaded = await admin.post("/v1/adapters", data={"name": "a"}, files=files)
    for reply in (by_path, uploaded):
        assert reply.status_code == 400, reply.text
        assert "'<|tool|>'" in reply.json()["error"]["message"]
    assert not services.adapters.entries()
    (folder / "added_tokens.json").unlink()
    (folder / "tokenizer.json").write_text(services.codec.tokenizer.to_str())
    assert (await admin.post("/v1/adapters", json={"name": "a", "path": "a"})).status_code == 201
