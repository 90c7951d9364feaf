"""/v1/adapters: registering by path and by upload, what is refused and leaves nothing behind, and the rest of an
adapter's life."""

import asyncio
import io
import json
import os
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from onebase_adapters.errors import StorageError
from onebase_adapters.store.adapter_store import AdapterStore
from onebase_engine.engine_info import AdapterInfo
from onebase_server.api.app import create_app
from onebase_server.api.services import ApiSettings, Services
from onebase_server.engine_process.engine_client import EngineUnavailableError

PATH = "/v1/adapters"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
Make = Callable[..., Path]


@pytest.fixture
def http(admin: httpx.AsyncClient) -> httpx.AsyncClient:
    return admin


async def register(http: httpx.AsyncClient, name: str, path: str) -> dict[str, Any]:
    reply = await http.post(PATH, json={"name": name, "path": path})
    assert reply.status_code == 201, reply.text
    document: dict[str, Any] = reply.json()
    return document


def left_behind(services: Services, tmp_path: Path) -> list[str]:
    """What the store holds: names, objects and scratch."""
    found = [entry.record.name for entry in services.adapters.entries()]
    for folder in ("objects", "staging"):
        found += sorted(path.name for path in (tmp_path / "store" / folder).iterdir())
    return found


def archive(files: Mapping[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as opened:
        for name, content in files.items():
            opened.writestr(name, content)
    return buffer.getvalue()


GOOD = {CONFIG: b'{"peft_type": "LORA"}', WEIGHTS: b"weights"}


async def test_the_adapter_object(
    http: httpx.AsyncClient, engine: Any, adapter_root: Path, new_adapter: Make, services: Services
) -> None:
    folder = new_adapter(adapter_root / "a")
    (folder / "onebase.json").write_text('{"metrics": {"loss": 1.5}}')
    made = await register(http, "team/a", "a")
    assert made.pop("created") > 1_700_000_000
    digest = made["digest"]
    assert made == {
        "id": "team/a",
        "object": "adapter",
        "version": 1,
        "current": True,
        "versions": [1],
        "digest": digest,
        "base": "f00d",
        "source": str(folder),
        "status": "served",
        "problem": None,
        "info": json.loads(msgspec.json.encode(AdapterInfo("LORA", 8, 1000, 2000, ("LowRank x 2",), 2))),
        "metrics": {"loss": 1.5},
    }
    assert engine.loaded == {digest: str(services.store.get("team/a").folder)}
    one = (await http.get(f"{PATH}/team/a")).json()
    assert {**made, "created": one["created"]} == one
    assert (await http.get(PATH)).json() == {"object": "list", "data": [one]}


async def test_a_path_may_be_absolute_if_it_is_below_the_root(
    http: httpx.AsyncClient, adapter_root: Path, new_adapter: Make
) -> None:
    new_adapter(adapter_root / "deep" / "a")
    await register(http, "a", str(adapter_root / "deep" / "a"))
    await register(http, "b", "deep/../deep/a/")


async def test_upload_of_files(http: httpx.AsyncClient, engine: Any, services: Services) -> None:
    files = [("files", (f"folder/{name}", content)) for name, content in GOOD.items()]
    files.append(("files", ("README.md", b"not kept")))
    reply = await http.post(PATH, data={"name": "a"}, files=files)
    assert reply.status_code == 201, reply.text
    assert reply.json()["source"] == "upload"
    folder = services.store.get("a").folder
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == GOOD
    assert list(engine.loaded) == [reply.json()["digest"]]


@pytest.mark.parametrize("prefix", ["", "my-adapter/"])
async def test_upload_of_a_zip(http: httpx.AsyncClient, services: Services, prefix: str) -> None:
    members = {prefix + name: content for name, content in GOOD.items()} | {f"__MACOSX/{prefix}{CONFIG}": b"x"}
    reply = await http.post(PATH, data={"name": "a"}, files={"file": ("a.zip", archive(members))})
    assert reply.status_code == 201, reply.text
    folder = services.store.get("a").folder
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == GOOD


async def test_delete(
    http: httpx.AsyncClient, engine: Any, adapter_root: Path, new_adapter: Make, services: Services, tmp_path: Path
) -> None:
    new_adapter(adapter_root / "a")
    made = await register(http, "a", "a")
    reply = await http.delete(f"{PATH}/a")
    assert (reply.status_code, reply.json()) == (200, {"id": "a", "object": "adapter", "deleted": True})
    assert (await http.get(f"{PATH}/a")).status_code == 404
    assert (await http.get(PATH)).json()["data"] == []
    for _ in range(100):
        if not left_behind(services, tmp_path):
            break
        await asyncio.sleep(0.01)
    assert left_behind(services, tmp_path) == []
    assert made["digest"] not in engine.loaded
    await register(http, "a", "a")


async def test_files_of_a_deleted_adapter_stay_until_the_engine_lets_go(
    http: httpx.AsyncClient, engine: Any, adapter_root: Path, new_adapter: Make, services: Services
) -> None:
    new_adapter(adapter_root / "a")
    await register(http, "a", "a")
    folder = services.store.get("a").folder
    finished = asyncio.Event()
    original = engine.unload_adapter

    async def unload(digest: str) -> None:
        await finished.wait()
        await original(digest)

    engine.unload_adapter = unload
    await http.delete(f"{PATH}/a")
    await asyncio.sleep(0.05)
    assert folder.is_dir()
    # The same content again, meanwhile: it must be loaded after the unload, not before.
    again = asyncio.create_task(register(http, "b", "a"))
    await asyncio.sleep(0.05)
    finished.set()
    made = await again
    assert engine.loaded == {made["digest"]: str(folder)}
    assert folder.is_dir()


async def test_same_content_under_two_names_is_loaded_until_both_are_gone(
    http: httpx.AsyncClient, engine: Any, adapter_root: Path, new_adapter: Make
) -> None:
    new_adapter(adapter_root / "a")
    first, second = await register(http, "a", "a"), await register(http, "b", "a")
    assert first["digest"] == second["digest"]
    await http.delete(f"{PATH}/a")
    await asyncio.sleep(0.02)
    assert list(engine.loaded) == [first["digest"]]


REFUSED_NAMES = ["", "../a", "a b", "a@1", "é", "-a", "x" * 200]


@pytest.mark.parametrize("name", REFUSED_NAMES)
async def test_bad_names(
    http: httpx.AsyncClient, adapter_root: Path, new_adapter: Make, services: Services, tmp_path: Path, name: str
) -> None:
    new_adapter(adapter_root / "a")
    reply = await http.post(PATH, json={"name": name, "path": "a"})
    error = reply.json()["error"]
    assert (reply.status_code, error["param"]) == (400, "name")
    assert "cannot be an adapter's name" in error["message"]
    assert left_behind(services, tmp_path) == []


async def test_taken_names(http: httpx.AsyncClient, adapter_root: Path, new_adapter: Make) -> None:
    new_adapter(adapter_root / "a")
    new_adapter(adapter_root / "b", b"other")
    made = await register(http, "a", "a")
    for name, reason in [("a", "'a' is taken"), ("tiny", "base model's own name")]:
        reply = await http.post(PATH, json={"name": name, "path": "b"})
        error = reply.json()["error"]
        assert (reply.status_code, error["param"], error["code"]) == (409, "name", "adapter_exists")
        assert reason in error["message"]
    assert (await http.get(f"{PATH}/a")).json()["digest"] == made["digest"]


async def test_one_of_many_at_once_gets_the_name(
    http: httpx.AsyncClient, adapter_root: Path, new_adapter: Make, services: Services, tmp_path: Path
) -> None:
    for number in range(6):
        new_adapter(adapter_root / str(number), bytes([number]))
    replies = await asyncio.gather(
        *(http.post(PATH, json={"name": "a", "path": str(number)}) for number in range(6))
    )
    statuses = sorted(reply.status_code for reply in replies)
    assert statuses == [201] + [409] * 5
    winner = next(reply.json() for reply in replies if reply.status_code == 201)
    assert left_behind(services, tmp_path) == ["a", winner["digest"]]


def outside(root: Path, make: Make) -> str:
    make(root.parent / "elsewhere")
    return "../elsewhere"


def linked_folder(root: Path, make: Make) -> str:
    make(root.parent / "elsewhere")
    (root / "link").symlink_to(root.parent / "elsewhere")
    return "link"


def linked_file(root: Path, make: Make) -> str:
    folder = make(root / "a")
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to("/etc/hosts")
    return "a"


def loop_of_links(root: Path, make: Make) -> str:
    (root / "x").symlink_to(root / "y")
    (root / "y").symlink_to(root / "x")
    return "x"


def pipe(root: Path, make: Make) -> str:
    folder = make(root / "a")
    (folder / WEIGHTS).unlink()
    os.mkfifo(folder / WEIGHTS)
    return "a"


def pickled(root: Path, make: Make) -> str:
    folder = make(root / "a")
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    return "a"


def without_config(root: Path, make: Make) -> str:
    folder = make(root / "a")
    (folder / CONFIG).unlink()
    return "a"


def broken_config(root: Path, make: Make) -> str:
    folder = make(root / "a")
    (folder / CONFIG).write_text("{")
    return "a"


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (outside, "outside the adapter root"),
        (linked_folder, "outside the adapter root"),
        (linked_file, "symbolic link"),
        (loop_of_links, "cannot be resolved|not a folder|Cannot read"),
        (pipe, "not a regular file"),
        (lambda root, make: "nobody", "not a folder"),
        (lambda root, make: "/etc", "outside the adapter root"),
        (lambda root, make: "a\0b", "zero byte"),
        (lambda root, make: "x" * 5000, "cannot be resolved|not a folder|Cannot read"),
        (lambda root, make: ".", "No adapter_config.json"),
        (pickled, "adapter_model.bin is a pickle"),
        (without_config, "No adapter_config.json"),
        (broken_config, "adapter_config.json is not JSON"),
    ],
)
async def test_bad_paths(
    http: httpx.AsyncClient,
    adapter_root: Path,
    new_adapter: Make,
    services: Services,
    tmp_path: Path,
    engine: Any,
    prepare: Callable[[Path, Make], str],
    message: str,
) -> None:
    reply = await http.post(PATH, json={"name": "a", "path": prepare(adapter_root, new_adapter)})
    error = reply.json()["error"]
    assert (reply.status_code, error["param"], error["code"]) == (400, "path", "invalid_adapter"), reply.text
    assert any(part in error["message"] for part in message.split("|")), error["message"]
    assert left_behind(services, tmp_path) == []
    assert not engine.loaded


@pytest.mark.parametrize(
    ("kind", "status", "code"),
    [
        ("AdapterFormatError", 400, "invalid_adapter"),
        ("AdapterMismatchError", 400, "invalid_adapter"),
        ("StorageError", 507, "insufficient_storage"),
    ],
)
async def test_what_the_engine_refuses_leaves_nothing_behind(
    http: httpx.AsyncClient,
    adapter_root: Path,
    new_adapter: Make,
    services: Services,
    tmp_path: Path,
    kind: str,
    status: int,
    code: str,
) -> None:
    new_adapter(adapter_root / "a", refuse=kind)
    reply = await http.post(PATH, json={"name": "a", "path": "a"})
    error = reply.json()["error"]
    assert (reply.status_code, error["code"], error["message"]) == (status, code, "The engine refuses this one.")
    assert left_behind(services, tmp_path) == []


async def test_a_refused_twin_does_not_take_the_first_away(
    http: httpx.AsyncClient, adapter_root: Path, new_adapter: Make, engine: Any, services: Services
) -> None:
    new_adapter(adapter_root / "a")
    made = await register(http, "a", "a")
    original = engine.load_adapter

    async def fail(digest: str, folder: str) -> AdapterInfo:
        raise EngineUnavailableError("The engine is restarting.", retry_after=5)

    engine.load_adapter = fail
    reply = await http.post(PATH, json={"name": "b", "path": "a"})
    assert (reply.status_code, reply.headers["retry-after"]) == (503, "5")
    engine.load_adapter = original
    assert made["digest"] in engine.loaded
    assert services.store.get("a").folder.is_dir()


async def test_no_room_on_the_disk(
    http: httpx.AsyncClient, adapter_root: Path, new_adapter: Make, services: Services, tmp_path: Path, engine: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    new_adapter(adapter_root / "a")

    def full(*_: Any, **__: Any) -> None:
        raise StorageError("Cannot write the adapter: no space left on the disk.")

    monkeypatch.setattr(services.store, "commit", full)
    reply = await http.post(PATH, json={"name": "a", "path": "a"})
    assert (reply.status_code, reply.json()["error"]["code"]) == (507, "insufficient_storage")
    assert left_behind(services, tmp_path) == []
    assert not engine.loaded


@pytest.mark.parametrize(
    ("data", "files", "field", "message"),
    [
        ({}, {"f": ("a.zip", archive(GOOD))}, "name", "'name' is required"),
        ({}, {"name": (None, "a")}, "files", "No files"),
        ({"name": "a", "path": "b"}, {"f": ("a.zip", archive(GOOD))}, "path", "Unknown field 'path'"),
        ({"name": "a"}, [("f", (f"{d}/{CONFIG}", b"{}")) for d in "xy"], "f", "Two files"),
        ({"name": "a"}, {"f": (CONFIG, GOOD[CONFIG])}, "path", "No adapter_model.safetensors"),
        ({"name": "a"}, {"f": ("a.zip", b"not a zip")}, "file", "archive cannot be read"),
        ({"name": "a"}, {"f": ("a.zip", archive(GOOD)[:-30])}, "file", "archive cannot be read"),
        ({"name": "a"}, {"f": ("a.zip", archive({f"{d}/{CONFIG}": b"{}" for d in "xy"}))}, "file", "two files"),
        ({"name": "a"}, {"f": ("a.zip", archive({str(i): b"" for i in range(100)}))}, "file", "more than 64"),
        ({"name": "a"}, {"f": ("a.zip", archive({"adapter_model.bin": b"", CONFIG: b"{}"}))}, "path", "pickle"),
    ],
)
async def test_bad_uploads(
    http: httpx.AsyncClient,
    services: Services,
    tmp_path: Path,
    data: dict[str, str],
    files: Any,
    field: str,
    message: str,
) -> None:
    reply = await http.post(PATH, data=data, files=files)
    error = reply.json()["error"]
    assert (reply.status_code, error["param"]) == (400, field), reply.text
    assert message in error["message"]
    assert left_behind(services, tmp_path) == []


async def test_a_corrupt_member_of_a_zip(http: httpx.AsyncClient, services: Services, tmp_path: Path) -> None:
    content = bytearray(archive({CONFIG: b'{"peft_type": "LORA"}', WEIGHTS: bytes(range(256)) * 50}))
    at = content.index(WEIGHTS.encode()) + len(WEIGHTS) + 5
    content[at] ^= 0xFF
    reply = await http.post(PATH, data={"name": "a"}, files={"f": ("a.zip", bytes(content))})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "file"), reply.text
    assert left_behind(services, tmp_path) == []


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        (b"", None, "not valid JSON"),
        (b"{", None, "not valid JSON"),
        (b"[]", None, "JSON object"),
        (b'{"name": "a"}', "path", "Field 'path' is required."),
        (b'{"name": 7, "path": "a"}', "name", "valid string"),
        (b'{"name": "a", "path": ""}', "path", "at least 1 character"),
        (b'{"name": "a", "path": "a", "rank": 8}', "rank", "Unknown field 'rank'."),
    ],
)
async def test_bad_bodies(http: httpx.AsyncClient, body: bytes, param: str | None, message: str) -> None:
    reply = await http.post(PATH, content=body)
    error = reply.json()["error"]
    assert (reply.status_code, error["param"]) == (400, param), reply.text
    assert message in error["message"]


async def test_a_broken_form(http: httpx.AsyncClient) -> None:
    for content_type in ("multipart/form-data", "multipart/form-data; boundary=x"):
        reply = await http.post(PATH, content=b"--y\r\nnonsense", headers={"content-type": content_type})
        assert reply.status_code == 400, reply.text
        assert reply.json()["error"]["type"] == "invalid_request_error"


async def test_without_a_root_there_are_uploads_only(
    engine: Any, codec: Any, store: AdapterStore, in_process: Callable[..., httpx.AsyncClient]
) -> None:
    services = Services.over(engine, codec, store, ApiSettings("tiny", admin_key="k"))
    async with in_process(services, key="k") as http:
        reply = await http.post(PATH, json={"name": "a", "path": "a"})
        assert reply.status_code == 400
        assert "--adapter-root" in reply.json()["error"]["message"]
        reply = await http.post(PATH, data={"name": "a"}, files={"f": ("a.zip", archive(GOOD))})
        assert reply.status_code == 201


async def test_too_large_an_upload(
    engine: Any, codec: Any, store: AdapterStore, in_process: Callable[..., httpx.AsyncClient], tmp_path: Path
) -> None:
    services = Services.over(engine, codec, store, ApiSettings("tiny", admin_key="k", max_upload_bytes=1000))
    async with in_process(services, key="k") as http:
        big = {CONFIG: GOOD[CONFIG], WEIGHTS: os.urandom(2000)}
        for headers in ({}, {"transfer-encoding": "chunked"}):
            request = http.build_request("POST", PATH, data={"name": "a"}, files={"f": ("a.zip", archive(big))})
            if headers:
                content = request.read()

                async def pieces(content: bytes = content) -> Any:
                    for at in range(0, len(content), 100):
                        yield content[at : at + 100]

                kind = {"content-type": request.headers["content-type"]}
                reply = await http.post(PATH, content=pieces(), headers=kind)
            else:
                reply = await http.send(request)
            assert (reply.status_code, reply.json()["error"]["code"]) == (413, "body_too_large"), reply.text
    assert left_behind(services, tmp_path) == []


async def test_unknown_adapter(http: httpx.AsyncClient, adapter_root: Path, new_adapter: Make) -> None:
    new_adapter(adapter_root / "a")
    await register(http, "known", "a")
    for call in (http.get, http.delete):
        reply = await call(f"{PATH}/nobody")
        error = reply.json()["error"]
        assert (reply.status_code, error["code"]) == (404, "model_not_found")
        assert "'nobody'" in error["message"]
        assert "tiny, known" in error["message"]


async def test_a_restart_loads_what_is_registered(
    http: httpx.AsyncClient, adapter_root: Path, new_adapter: Make, services: Services, engine: Any, codec: Any
) -> None:
    for name in ("a", "b", "other"):
        new_adapter(adapter_root / name, name.encode())
        await register(http, name, name)
    (services.store.get("b").folder / CONFIG).write_text('{"refuse": "AdapterFormatError"}')
    engine.loaded.clear()
    again = Services.over(engine, codec, services.store, services.settings)
    await again.adapters.load_all()
    problems = {entry.record.name: entry.problem for entry in again.adapters.entries()}
    assert problems == {"a": None, "b": "The engine refuses this one.", "other": None}
    engine.info = msgspec.structs.replace(engine.info, fingerprint="other")
    engine.loaded.clear()
    again = Services.over(engine, codec, services.store, services.settings)
    await again.adapters.load_all()
    assert {entry.problem for entry in again.adapters.entries()} == {"it was registered for another base (f00d)"}
    assert not engine.loaded
    async with httpx.AsyncClient(transport=httpx.ASGITransport(create_app(again)), base_url="http://test") as plain:
        reply = await plain.post("/v1/completions", json={"model": "a", "prompt": "x"})
        assert (reply.status_code, reply.json()["error"]["code"]) == (400, "invalid_adapter")
        assert "another base" in reply.json()["error"]["message"]
        assert (await plain.get("/v1/models/a")).status_code == 404
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(create_app(again)), base_url="http://test", headers=http.headers
    ) as plain:
        assert (await plain.get(f"{PATH}/a")).json()["status"] == "not_served"


@pytest.mark.parametrize(
    ("damage", "message"),
    [("broken", "not a whole safetensors file"), ("nan", "holds NaN or infinity")],
)
async def test_broken_tensors_are_refused_by_the_engines_own_reader(
    http: httpx.AsyncClient, engine: Any, adapter_root: Path, new_adapter: Make, services: Services, tmp_path: Path,
    damage: str, message: str,
) -> None:  # fmt: skip
    import torch
    from safetensors.torch import save_file

    from onebase_adapters.formats.read_adapter import read_adapter

    async def load(digest: str, folder: str) -> AdapterInfo:
        await asyncio.to_thread(read_adapter, Path(folder))
        return AdapterInfo("lora", 2, 64, 128, ("LowRank x 1",), 1)

    engine.load_adapter = load
    save_file({"a": torch.ones(2, 2)}, new_adapter(adapter_root / "good") / WEIGHTS)
    folder = new_adapter(adapter_root / "a")
    if damage == "nan":
        save_file({"a": torch.tensor([1.0, float("nan")])}, folder / WEIGHTS)
    else:
        (folder / WEIGHTS).write_bytes((adapter_root / "good" / WEIGHTS).read_bytes()[:-4])
    reply = await http.post(PATH, json={"name": "a", "path": "a"})
    assert reply.status_code == 400, reply.text
    assert message in reply.json()["error"]["message"]
    assert left_behind(services, tmp_path) == []
    await register(http, "a", "good")


async def test_a_change_ends_before_the_store_is_closed(
    http: httpx.AsyncClient, services: Services, engine: Any, adapter_root: Path, new_adapter: Any, admin_key: str
) -> None:
    """The server is told to stop while an adapter is being loaded."""
    new_adapter(adapter_root / "a")
    loading, go_on = asyncio.Event(), asyncio.Event()
    load = engine.load_adapter

    async def slowly(digest: str, folder: str) -> Any:
        loading.set()
        await go_on.wait()
        return await load(digest, folder)

    engine.load_adapter = slowly
    headers = {"authorization": f"Bearer {admin_key}"}
    register = asyncio.create_task(http.post("/v1/adapters", json={"name": "a", "path": "a"}, headers=headers))
    await loading.wait()
    closing = asyncio.create_task(services.adapters.close())
    late = asyncio.create_task(http.delete("/v1/adapters/a", headers=headers))
    await asyncio.sleep(0.05)
    assert not closing.done()
    go_on.set()
    assert (await register).status_code == 201
    await closing
    reply = await late
    assert (reply.status_code, reply.headers["retry-after"]) == (503, "5")
    await services.adapters.settle()
