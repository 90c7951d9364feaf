"""Compiled kernels on disk: found by who made them, never by another, and made anew where they are damaged."""

import logging
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llvmlite
import numba
import pytest
from numba.core.registry import cpu_target

from onebase_engine.kernels.cpu import cache
from onebase_engine.kernels.cpu.build import Build
from onebase_engine.kernels.cpu.task import WHOLE, Compiled
from support import lesser


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache."""
    monkeypatch.setenv("ONEBASE_CACHE", str(tmp_path))
    (tmp_path / "kernels").mkdir()
    monkeypatch.setattr(Compiled, "known", [])
    cache._version.cache_clear()
    cache._tell_once.cache_clear()
    yield tmp_path / "kernels"
    cache._version.cache_clear()


def twice() -> Compiled:
    """As a process has it that has just started."""
    return Compiled(lambda x: 2 * x, "twice", (WHOLE,))


def was_read() -> bool:
    """Call it; whether its code came from the disk."""
    made = twice()
    assert made.call(21) == 42
    hits, misses = made.function._cache_hits, made.function._cache_misses
    assert sum(hits.values()) + sum(misses.values()) == 1
    return bool(hits)


def test_a_kernel_is_compiled_once(folder: Path) -> None:
    assert not twice().present
    assert not was_read()
    assert twice().present
    assert was_read()
    (found,) = folder.rglob("twice-*")
    assert found.parent == cache.version_folder()
    assert [path.name for path in folder.rglob("*") if path.name.startswith(".")] == []


@pytest.mark.parametrize(
    ("owner", "name", "value"),
    [
        (numba, "__version__", "0.0.1"),
        (llvmlite, "__version__", "0.0.1"),
        (platform, "python_version", lambda: "3.0.0"),
        (numba.config, "OPT", 1),
        (Path, "read_bytes", lambda _: b"other sources"),
        (type(cpu_target.target_context.codegen()), "magic_tuple", lambda _: ("x86_64", "old", "+sse2")),
    ],
)
def test_what_another_version_or_processor_compiled_is_not_found(
    owner: Any, name: str, value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = cache._version()
    cache._version.cache_clear()
    with monkeypatch.context() as other:
        other.setattr(owner, name, value)
        there = cache._version()
    assert there != here
    cache._version.cache_clear()
    with monkeypatch.context() as other:
        other.setattr(cache, "_version", lambda: there)
        twice().prepare()
    assert not was_read()


@pytest.mark.skipif(os.environ | lesser.ENVIRONMENT == os.environ, reason="numba is told so already")
def test_a_lesser_processor_has_a_folder_of_its_own() -> None:
    """As numba is really told."""
    ask = "from onebase_engine.kernels.cpu.cache import version_folder; print(version_folder())"
    found = [
        subprocess.run([sys.executable, "-c", ask], env=env, capture_output=True, text=True, check=True).stdout
        for env in (os.environ, os.environ | lesser.ENVIRONMENT)
    ]
    assert found[0].strip() == str(cache.version_folder())
    assert found[1] != found[0]


@pytest.mark.parametrize("damage", ["empty", "truncated", "garbled"])
def test_a_damaged_file_is_made_again(damage: str, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    was_read()
    (file,) = folder.rglob("twice-*")
    whole = file.read_bytes()
    middle = len(whole) // 2
    garbled = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    file.write_bytes({"empty": b"", "truncated": whole[:-1], "garbled": garbled}[damage])
    assert not twice().present
    assert not was_read()
    assert "is damaged; the kernel is compiled again" in caplog.text
    assert was_read()


def test_where_nothing_can_be_written_kernels_are_compiled_all_the_same(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache.version_folder().write_text("in the way")
    assert not was_read()
    assert not was_read()
    assert caplog.text.count("cannot be kept") == 1


def test_what_no_version_has_used_for_a_month_goes(folder: Path) -> None:
    was_read()
    old, young = folder / ("0" * 16), folder / ("1" * 16)
    for path, days in ((old, 31), (young, 29), (cache.version_folder(), 400)):
        path.mkdir(exist_ok=True)
        os.utime(path, (0, time.time() - days * 86400))
    cache.remove_unused()
    assert sorted(folder.iterdir()) == sorted([young, cache.version_folder()])
    assert was_read()


@pytest.mark.slow
class TestBuild:
    """Compiling beforehand, in other processes."""

    @pytest.fixture
    def few(self, monkeypatch: pytest.MonkeyPatch) -> list[Compiled]:
        """Some of the real kernels, as a process has them that has just started."""
        from onebase_engine.kernels.cpu import elementwise, task

        again = [
            Compiled(kernel.function.py_func, kernel.name, kernel._kinds, **options)
            for kernel, options in ((task.REGION, {"parallel": True}), (elementwise.gate_row, {}))
        ]
        monkeypatch.setattr(Compiled, "known", again)
        return again

    def test_it_leaves_all_on_disk_and_says_so(self, few: list[Compiled]) -> None:
        told: list[str] = []
        Build(told.append).wait()
        assert told[0] == f"compiling 2 kernels, once on this machine: kept in {cache.version_folder()}"
        for kernel in few:
            kernel.prepare()
            assert kernel.function._cache_hits, kernel.name
        told.clear()
        Build(told.append).wait()
        assert told == []

    def test_only_what_is_damaged_is_made_again(self, few: list[Compiled]) -> None:
        Build(lambda _: None).wait()
        before = {path: path.stat().st_mtime_ns for path in cache.version_folder().iterdir()}
        damaged = next(path for path in before if path.name.startswith("elementwise"))
        damaged.write_bytes(damaged.read_bytes()[:100])
        told: list[str] = []
        Build(told.append).wait()
        assert told[0].startswith("compiling 1 kernels")
        assert all(kernel.present for kernel in few)
        assert {path: path.stat().st_mtime_ns for path in before if path != damaged} == {
            path: written for path, written in before.items() if path != damaged
        }

    def test_a_process_that_fails_leaves_the_kernel_to_its_first_use(
        self, few: list[Compiled], caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
    ) -> None:
        twice()  # which other processes do not know
        caplog.set_level(logging.WARNING)
        build = Build(lambda _: None)
        build.wait()
        build._thread.join()
        assert "could not be compiled beforehand" in caplog.text
        assert not was_read()
