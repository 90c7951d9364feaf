"""Versions of an adapter: replaced, tried, promoted, rolled back, deleted, each at once or not at all."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from onebase_adapters.errors import StorageError
from onebase_server.api.services import Services

PATH = "/v1/adapters"
Make = Callable[..., Path]


@pytest.fixture
def http(admin: httpx.AsyncClient) -> httpx.AsyncClient:
    return admin


@pytest.fixture
def folders(adapter_root: Path, new_adapter: Make) -> None:
    for number in range(1, 5):
        new_adapter(adapter_root / str(number), bytes([number]))
    new_adapter(adapter_root / "bad", b"bad", refuse="AdapterMismatchError")


async def post(http: httpx.AsyncClient, where: str, status: int = 201, **body: Any) -> dict[str, Any]:
    reply = await http.post(f"{PATH}{where}", json=body)
    assert reply.status_code == status, reply.text
    document: dict[str, Any] = reply.json()
    return document


async def runs_on(http: httpx.AsyncClient, engine: Any, model: str) -> str:
    reply = await http.post("/v1/completions", json={"model": model, "prompt": "a"})
    assert reply.status_code == 200, reply.text
    adapter: str = engine.requests[-1].adapter
    return adapter


@pytest.mark.usefixtures("folders")
async def test_a_versions_life(http: httpx.AsyncClient, engine: Any, services: Services) -> None:
    one = await post(http, "", name="team/a", path="1", replace=True)
    two = await post(http, "", name="team/a", path="2", replace=True)
    three = await post(http, "/team/a/versions", path="3", promote=False)
    assert [made["version"] for made in (one, two, three)] == [1, 2, 3]
    assert [made["current"] for made in (one, two, three)] == [True, True, False]
    assert three["versions"] == [1, 2, 3]
    digests = {f"team/a@{made['version']}": made["digest"] for made in (one, two, three)}
    for model, digest in digests.items():
        assert await runs_on(http, engine, model) == digest
        assert await runs_on(http, engine, f"tiny:{model}") == digest
        assert (await http.get(f"{PATH}/{model}")).json()["digest"] == digest
        assert (await http.get(f"/v1/models/{model}")).json()["id"] == model
    assert await runs_on(http, engine, "team/a") == await runs_on(http, engine, "tiny:team/a") == two["digest"]
    assert [model["id"] for model in (await http.get("/v1/models")).json()["data"]] == ["tiny", "team/a"]

    promoted = await post(http, "/team/a/promote", 200, version=3)
    assert (promoted["version"], promoted["current"]) == (3, True)
    assert await runs_on(http, engine, "team/a") == three["digest"]
    assert (await post(http, "/team/a/rollback", 200))["version"] == 2
    assert await runs_on(http, engine, "team/a") == two["digest"]
    assert (await post(http, "/team/a/rollback", 200))["version"] == 3

    again = Services.over(engine, services.codec, services.store, services.settings)
    await again.adapters.load_all()
    assert again.adapters.resolve("team/a").adapter == three["digest"]
    assert again.adapters.resolve("team/a@1").adapter == one["digest"]

    assert (await http.delete(f"{PATH}/team/a@1")).json()["id"] == "team/a@1"
    await asyncio.sleep(0.02)
    assert one["digest"] not in engine.loaded
    reply = await http.post("/v1/completions", json={"model": "team/a@1", "prompt": "a"})
    assert reply.status_code == 404
    assert reply.json()["error"]["message"] == "'team/a' has no version '1'. It has: 2, 3."
    assert (await http.get(f"{PATH}/team/a")).json()["versions"] == [2, 3]
    await http.delete(f"{PATH}/team/a")
    await asyncio.sleep(0.02)
    assert not engine.loaded
    assert services.store.list() == []


@pytest.mark.usefixtures("folders")
async def test_requests_finish_on_what_they_began_with(http: httpx.AsyncClient, engine: Any) -> None:
    one = await post(http, "", name="a", path="1")
    engine.delay = 0.01
    running = asyncio.create_task(runs_on(http, engine, "a"))
    await asyncio.sleep(0.005)
    two = await post(http, "", name="a", path="2", replace=True)
    assert await running == one["digest"]
    assert await runs_on(http, engine, "a") == two["digest"]


@pytest.mark.usefixtures("folders")
async def test_a_replacement_that_fails_changes_nothing(
    http: httpx.AsyncClient, engine: Any, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = await post(http, "", name="a", path="1")
    before = (await http.get(f"{PATH}/a")).json()
    for body, status in [({"path": "bad"}, 400), ({"path": "nothing"}, 400), ({"path": "../x"}, 400)]:
        await post(http, "", status, name="a", replace=True, **body)
        await post(http, "/a/versions", status, **body)

    def full(*_: Any, **__: Any) -> None:
        raise StorageError("No space.")

    with monkeypatch.context() as patch:
        patch.setattr(services.store, "commit", full)
        await post(http, "", 507, name="a", path="2", replace=True)
    assert (await http.get(f"{PATH}/a")).json() == before
    assert list(engine.loaded) == [one["digest"]]
    assert await runs_on(http, engine, "a") == one["digest"]


@pytest.mark.usefixtures("folders")
async def test_an_upload_makes_a_version(http: httpx.AsyncClient) -> None:
    files = {"f": ("adapter_config.json", b"{}"), "g": ("adapter_model.safetensors", b"x")}
    for path, data, version, current in [
        ("", {"name": "a"}, 1, True),
        ("", {"name": "a", "replace": "true"}, 2, True),
        ("/a/versions", {"promote": "false"}, 3, False),
        ("/a/versions", {}, 4, True),
    ]:
        reply = await http.post(PATH + path, data=data, files=files)
        assert reply.status_code == 201, reply.text
        assert (reply.json()["version"], reply.json()["current"]) == (version, current)
    assert (await http.post(PATH, data={"name": "a"}, files=files)).status_code == 409
    reply = await http.post(PATH, data={"name": "a", "replace": "perhaps"}, files=files)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "replace")


@pytest.mark.usefixtures("folders")
@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("", {"name": "a", "path": "2"}, 409, "send replace to make a new version"),
        ("", {"name": "tiny", "path": "2", "replace": True}, 409, "base model's own name"),
        ("/nobody/versions", {"path": "2"}, 404, "No adapter is named 'nobody'. This server has: tiny, a."),
        ("/a@1/versions", {"path": "2"}, 400, "cannot be an adapter's name"),
        ("/a/versions", {}, 400, "Field 'path' is required."),
        ("/a/versions", {"path": "2", "name": "b"}, 400, "Unknown field 'name'."),
        ("/a/promote", {"version": 9}, 404, "'a' has no version '9'. It has: 1."),
        ("/a/promote", {"version": 0}, 400, "greater than or equal to 1"),
        ("/a/promote", {}, 400, "Field 'version' is required."),
        ("/nobody/promote", {"version": 1}, 404, "No adapter is named 'nobody'."),
        ("/a/rollback", {}, 400, "no earlier version"),
        ("/nobody/rollback", {}, 404, "No adapter is named 'nobody'."),
    ],
)
async def test_what_is_refused(
    http: httpx.AsyncClient, path: str, body: dict[str, Any], status: int, message: str
) -> None:
    await post(http, "", name="a", path="1")
    error = (await post(http, path, status, **body))["error"]
    assert message in error["message"]


@pytest.mark.usefixtures("folders")
async def test_the_current_version_is_not_deleted_alone(http: httpx.AsyncClient) -> None:
    await post(http, "", name="a", path="1")
    for name, status, message in [
        ("a@1", 400, "promote another first"),
        ("a@2", 404, "has no version '2'"),
        ("a@x", 404, "has no version 'x'"),
        ("b@1", 404, "No adapter is named 'b'"),
    ]:
        reply = await http.delete(f"{PATH}/{name}")
        assert (reply.status_code, message in reply.text) == (status, True), reply.text


@pytest.mark.usefixtures("folders")
async def test_vllms_calls(http: httpx.AsyncClient, engine: Any) -> None:
    load, unload = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
    body = {"lora_name": "a", "lora_path": "1"}
    reply = await http.post(load, json=body)
    assert (reply.status_code, reply.text) == (200, "Success: LoRA adapter 'a' added successfully.")
    first = await runs_on(http, engine, "a")
    reply = await http.post(load, json=body)
    assert reply.status_code == 400
    assert "has already been loaded" in reply.json()["error"]["message"]
    assert (await http.post(load, json={**body, "lora_path": "2", "load_inplace": True})).status_code == 200
    assert await runs_on(http, engine, "a") != first
    reply = await http.post(unload, json={"lora_name": "a", "lora_int_id": 3})
    assert (reply.status_code, reply.text) == (200, "Success: LoRA adapter 'a' removed successfully.")
    assert (await http.post(unload, json={"lora_name": "a"})).status_code == 404
    assert (await http.post(load, json={"lora_name": "a", "lora_path": "../x"})).status_code == 400
    del http.headers["authorization"]
    for path, content in ((load, body), (unload, {"lora_name": "a"})):
        assert (await http.post(path, json=content)).status_code == 401
