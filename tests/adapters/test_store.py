"""The adapter store: what it refuses, what it keeps, and that a kill at any point leaves the old or the new."""

import io
import json
import os
import sqlite3
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from onebase_adapters.errors import (
    AdapterError,
    AdapterExistsError,
    AdapterFormatError,
    AdapterNotFoundError,
    AdapterPathError,
    StorageError,
)
from onebase_adapters.store import adapter_store as store_module
from onebase_adapters.store import registry as registry_module
from onebase_adapters.store.adapter_store import AdapterStore
from onebase_adapters.store.registry import check_name


@pytest.fixture
def store(tmp_path: Path) -> Iterator[AdapterStore]:
    with closing(AdapterStore(tmp_path / "store")) as opened:
        yield opened


def make_adapter(folder: Path, weights: bytes = b"weights", **sidecar: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (folder / "adapter_model.safetensors").write_bytes(weights)
    if sidecar:
        (folder / "onebase.json").write_text(json.dumps(sidecar))
    return folder


def register(store: AdapterStore, name: str, folder: Path) -> str:
    staged = store.stage(folder)
    return store.commit(name, staged, {"method": "lora"}, base="f00d").digest


def objects(store_root: Path) -> list[str]:
    return sorted(path.name for path in (store_root / "objects").iterdir())


def test_registered_adapter_survives_reopening(tmp_path: Path) -> None:
    source = make_adapter(tmp_path / "a", metrics={"loss": 1.5})
    (source / "README.md").write_text("not copied")
    with closing(AdapterStore(tmp_path / "store")) as store:
        register(store, "team/a:1", source)
    with closing(AdapterStore(tmp_path / "store")) as store:
        (record,) = store.list()
        assert record == store.get("team/a:1")
        assert (record.name, record.version, record.base, record.source) == ("team/a:1", 1, "f00d", str(source))
        assert record.info == {"method": "lora"}
        assert record.metrics == {"loss": 1.5}
        assert sorted(p.name for p in record.folder.iterdir()) == [
            "adapter_config.json",
            "adapter_model.safetensors",
            "onebase.json",
        ]
        assert (record.folder / "adapter_model.safetensors").read_bytes() == b"weights"


def test_same_content_is_stored_once_and_goes_with_its_last_name(store: AdapterStore, tmp_path: Path) -> None:
    first = register(store, "a", make_adapter(tmp_path / "a"))
    second = register(store, "b", make_adapter(tmp_path / "b"))
    assert first == second
    assert objects(tmp_path / "store") == [first]
    store.delete("a")
    assert store.in_use(first)
    assert store.get("b").folder.is_dir()
    store.delete("b")
    assert not store.in_use(first)
    assert objects(tmp_path / "store") == []


def test_name_is_taken_until_deleted(store: AdapterStore, tmp_path: Path) -> None:
    register(store, "a", make_adapter(tmp_path / "a"))
    other = store.stage(make_adapter(tmp_path / "b", b"other"))
    with pytest.raises(AdapterExistsError, match="'a' is taken"):
        store.commit("a", other, {}, base="f00d")
    store.discard(other)
    assert len(objects(tmp_path / "store")) == 1
    store.delete("a")
    register(store, "a", tmp_path / "b")
    assert (store.get("a").folder / "adapter_model.safetensors").read_bytes() == b"other"


def replace(store: AdapterStore, name: str, folder: Path, *, promote: bool = True) -> int:
    return store.commit(name, store.stage(folder), {}, base="f00d", replace=True, promote=promote).version


def versions(store: AdapterStore) -> dict[str, bool]:
    return {f"{record.name}@{record.version}": record.current for record in store.list()}


def test_versions_of_a_name(tmp_path: Path) -> None:
    folders = [make_adapter(tmp_path / str(i), bytes([i])) for i in range(4)]
    with closing(AdapterStore(tmp_path / "store")) as store:
        assert replace(store, "a", folders[0]) == 1
        assert replace(store, "a", folders[1]) == 2
        assert replace(store, "a", folders[2], promote=False) == 3
        assert versions(store) == {"a@1": False, "a@2": True, "a@3": False}
        assert store.get("a") == store.get("a", 2)
        assert store.promote("a", 3).current
        assert store.promote("a", None).version == 2
        assert store.promote("a", None).version == 3
        assert store.promote("a", 3).version == 3
        assert store.promote("a", None).version == 2
    with closing(AdapterStore(tmp_path / "store")) as store:
        assert versions(store) == {"a@1": False, "a@2": True, "a@3": False}
        assert len(objects(tmp_path / "store")) == 3
        with pytest.raises(AdapterError, match="promote another first"):
            store.delete("a", 2)
        (gone,) = store.delete("a", 3)
        assert gone.version == 3
        assert len(objects(tmp_path / "store")) == 2
        with pytest.raises(AdapterError, match="no earlier version"):
            store.promote("a", None)
        assert replace(store, "a", folders[3]) == 4, "a number was given twice"
        with pytest.raises(AdapterNotFoundError, match="It has: 1, 2, 4"):
            store.get("a", 3)
        with pytest.raises(AdapterNotFoundError):
            store.promote("b", 1)
        assert [record.version for record in store.delete("a")] == [1, 2, 4]
        assert objects(tmp_path / "store") == []
        assert replace(store, "a", folders[0]) == 1


def test_a_registry_of_the_first_schema_is_taken_over(tmp_path: Path) -> None:
    with closing(AdapterStore(tmp_path / "store")) as store:
        register(store, "a", make_adapter(tmp_path / "a"))
        record = store.get("a")
    with closing(sqlite3.connect(tmp_path / "store" / "registry.sqlite3")) as db:
        db.executescript("DROP TABLE names; PRAGMA user_version = 1;")
    with closing(AdapterStore(tmp_path / "store")) as store:
        assert store.list() == [record]


def test_unknown_name(store: AdapterStore) -> None:
    with pytest.raises(AdapterNotFoundError):
        store.get("nobody")
    with pytest.raises(AdapterNotFoundError):
        store.delete("nobody")


def test_object_stays_while_another_stage_of_it_is_open(store: AdapterStore, tmp_path: Path) -> None:
    source = make_adapter(tmp_path / "a")
    register(store, "a", source)
    staged, twin = store.stage(source), store.stage(source)
    store.delete("a")
    store.discard(twin)
    assert staged.folder.is_dir()
    store.commit("b", staged, {}, base="f00d")
    assert store.get("b").folder.is_dir()


@pytest.mark.parametrize("name", ["a", "A.b_c:d-e", "team/x", "9", "x" * 128])
def test_good_names(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize(
    "name", ["", ".a", "-a", "/a", "a/", "a..b", "../a", "a//b", "a b", "a\n", "a@1", "é", "x" * 129, "a\0"]
)
def test_bad_names(name: str) -> None:
    with pytest.raises(AdapterFormatError) as caught:
        check_name(name)
    assert caught.value.field == "name"


def test_refuses_pickles_and_says_the_way_out(store: AdapterStore, tmp_path: Path) -> None:
    source = make_adapter(tmp_path / "a")
    (source / "adapter_model.safetensors").rename(source / "adapter_model.bin")
    with pytest.raises(AdapterFormatError, match=r"adapter_model\.bin is a pickle.*safe_serialization=True"):
        store.stage(source)


def test_pickle_beside_safetensors_is_left_behind(store: AdapterStore, tmp_path: Path) -> None:
    source = make_adapter(tmp_path / "a")
    (source / "adapter_model.bin").write_bytes(b"x")
    assert not (store.stage(source).folder / "adapter_model.bin").exists()


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda f: (f / "adapter_config.json").unlink(), AdapterFormatError, "No adapter_config.json"),
        (lambda f: (f / "adapter_model.safetensors").unlink(), AdapterFormatError, "No adapter_model.safetensors"),
        (lambda f: (f / "adapter_config.json").write_text("{"), AdapterFormatError, "is not JSON"),
        (lambda f: (f / "adapter_config.json").write_text("[" * 99999), AdapterFormatError, "is not JSON"),
        (lambda f: (f / "adapter_config.json").write_text("[]"), AdapterFormatError, "not a JSON object"),
        (lambda f: (f / "adapter_config.json").write_bytes(b" " * (5 << 20)), AdapterFormatError, "larger than"),
        (lambda f: (f / "onebase.json").symlink_to("/etc/hosts"), AdapterPathError, "symbolic link"),
        (lambda f: os.mkfifo(f / "onebase.json"), AdapterPathError, "not a regular file"),
    ],
)
def test_refused_folders_leave_nothing(
    store: AdapterStore, tmp_path: Path, damage: Callable[[Path], object], error: type[Exception], message: str
) -> None:
    source = make_adapter(tmp_path / "a")
    damage(source)
    with pytest.raises(error, match=message):
        store.stage(source)
    assert objects(tmp_path / "store") == []
    assert list((tmp_path / "store" / "staging").iterdir()) == []


def test_links_are_followed_below_the_root(store: AdapterStore, tmp_path: Path) -> None:
    """As in the cache of a hub, whose snapshots link to blobs."""
    source = make_adapter(tmp_path / "hub" / "snapshots" / "main")
    weights, blob = source / "adapter_model.safetensors", tmp_path / "hub" / "blobs" / "abc"
    blob.parent.mkdir()
    weights.rename(blob)
    weights.symlink_to("../../blobs/abc")
    staged = store.stage(source, root=tmp_path / "hub")
    assert (staged.folder / weights.name).read_bytes() == blob.read_bytes()
    assert not (staged.folder / weights.name).is_symlink()
    with pytest.raises(AdapterPathError, match="leads out of the adapter root"):
        store.stage(source, root=source)


def test_refuses_a_missing_folder(store: AdapterStore, tmp_path: Path) -> None:
    with pytest.raises(AdapterPathError, match="is not a folder"):
        store.stage(tmp_path / "none")


def test_upload_is_bounded(tmp_path: Path) -> None:
    with closing(AdapterStore(tmp_path / "store", max_bytes=1000)) as store:
        files = {"adapter_config.json": io.BytesIO(b"{}"), "adapter_model.safetensors": io.BytesIO(b"x" * 2000)}
        with pytest.raises(AdapterFormatError, match="larger than"):
            store.stage_files(files)


def test_a_full_disk_is_a_storage_error(
    store: AdapterStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device", "adapter_model.safetensors")

    source = make_adapter(tmp_path / "a")
    with monkeypatch.context() as patch:
        patch.setattr(store_module.os, "fsync", full)
        with pytest.raises(StorageError, match="no space left"):
            store.stage(source)
    assert list((tmp_path / "store" / "staging").iterdir()) == []
    register(store, "a", source)


def test_a_newer_or_broken_registry_is_refused(tmp_path: Path) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "registry.sqlite3").write_bytes(b"not a database" * 100)
    with pytest.raises(StorageError, match="registry failed"):
        AdapterStore(tmp_path / "broken")
    AdapterStore(tmp_path / "newer").close()
    with closing(sqlite3.connect(tmp_path / "newer" / "registry.sqlite3")) as db:
        db.execute("PRAGMA user_version = 99")
    with pytest.raises(StorageError, match="newer OneBase"):
        AdapterStore(tmp_path / "newer")


def test_a_second_process_does_not_sweep_what_the_first_is_staging(store: AdapterStore, tmp_path: Path) -> None:
    staged = store.stage(make_adapter(tmp_path / "a"))
    with closing(AdapterStore(tmp_path / "store")):
        assert staged.folder.is_dir()


def test_threads_may_share_it(store: AdapterStore, tmp_path: Path) -> None:
    sources = [make_adapter(tmp_path / f"a{i}", bytes([i])) for i in range(4)]
    failures: list[Exception] = []

    def work(index: int) -> None:
        try:
            for turn in range(5):
                register(store, f"n{index}-{turn}", sources[(index + turn) % 4])
                store.list()
                if turn % 2:
                    store.delete(f"n{index}-{turn}")
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert len(store.list()) == 8 * 3
    assert all(record.folder.is_dir() for record in store.list())


def killed_at(point: int, work: Callable[[], None]) -> bool:
    """Run `work` in a child that dies at the `point`-th call out of our files; False once it ends before that."""
    ours = (store_module.__file__, registry_module.__file__)
    child = os.fork()
    if child == 0:
        left = point

        def count(frame: FrameType, event: str, _: object) -> None:
            nonlocal left
            if event == "c_call" and frame.f_code.co_filename in ours:
                left -= 1
                if left == 0:
                    os._exit(9)

        sys.setprofile(count)
        try:
            work()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


@pytest.mark.slow
def test_a_kill_at_any_point_leaves_the_old_state_or_the_new(tmp_path: Path) -> None:
    old, new = make_adapter(tmp_path / "old", b"old"), make_adapter(tmp_path / "new", b"new" * 1000)
    root = tmp_path / "store"

    def replace() -> None:
        with closing(AdapterStore(root)) as store:
            register(store, "new", new)
            store.delete("old")

    seen = set()
    point = 1
    while True:
        with closing(AdapterStore(root)) as store:
            for record in store.list():
                store.delete(record.name)
            register(store, "old", old)
        killed = killed_at(point, replace)
        with closing(AdapterStore(root)) as store:
            records = store.list()
            seen.add(tuple(record.name for record in records))
            assert objects(root) == sorted(record.digest for record in records)
            assert list((root / "staging").iterdir()) == []
            for record in records:
                source = {"old": old, "new": new}[record.name]
                weights = (record.folder / "adapter_model.safetensors").read_bytes()
                assert weights == (source / "adapter_model.safetensors").read_bytes()
        if not killed:
            break
        point += 1
    assert seen == {("old",), ("new", "old"), ("new",)}
    assert point > 50
