"""Compiled kernels on disk: one file for each, checked before it is run.

The folder's name is a digest of everything that the code depends on: these sources, the processor and its features,
Python, numba and LLVM. So code of another version or for another machine is never found. numba's own cache looks
only at the file that a function stands in, and a damaged file of its ends the process.
"""

import hashlib
import logging
import os
import pickle
import platform
import shutil
import tempfile
import time
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import llvmlite
import numba
from numba.core import compiler
from numba.core.caching import NullCache
from numba.core.registry import cpu_target
from numba.core.serialize import dumps

from onebase_engine.user_folders import cache_home

log = logging.getLogger(__name__)

_DIGEST = hashlib.sha256().digest_size
_UNUSED_DAYS = 30
"""After which what another version or processor has left behind is removed."""


def kernel_folder() -> Path:
    """Where the kernels of all versions are."""
    return cache_home() / "kernels"


@cache
def _version() -> str:
    """A digest of all that compiled code depends on."""
    here = Path(__file__).parent
    digest = hashlib.sha256()
    for source in [here.parent / "batch.py", *sorted(here.glob("*.py"))]:
        digest.update(source.read_bytes())
    machine = cpu_target.target_context.codegen().magic_tuple()
    versions = (platform.python_version(), numba.__version__, llvmlite.__version__)
    digest.update(repr((machine, versions, numba.config.OPT)).encode())
    return digest.hexdigest()[:16]


def version_folder() -> Path:
    """Where this version's kernels for this processor are."""
    return kernel_folder() / _version()


def remove_unused() -> None:
    """Remove the kernels that no version has used for a month."""
    with suppress(OSError):
        if version_folder().exists():
            os.utime(version_folder())
        for folder in kernel_folder().iterdir():
            if time.time() - folder.stat().st_mtime > _UNUSED_DAYS * 86400:
                shutil.rmtree(folder, ignore_errors=True)


class KernelCache(NullCache):  # type: ignore[misc]
    """The cache that numba asks for a function's code."""

    def __init__(self, name: str) -> None:
        self._name = name

    @property
    def cache_path(self) -> str:
        return str(version_folder())

    def present(self, sig: Any) -> bool:
        """Whether there is a file for this signature that is as it was written."""
        return self._read(sig) is not None

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        target_context.refresh()
        content = self._read(sig)
        return None if content is None else compiler.CompileResult._rebuild(target_context, *pickle.loads(content))

    def save_overload(self, sig: Any, data: Any) -> None:
        content = dumps(data._reduce())
        path = self._path(sig)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".", delete=False) as file:
                file.write(hashlib.sha256(content).digest() + content)
            Path(file.name).replace(path)
        except OSError as error:
            _tell_once(f"compiled kernels cannot be kept, so every start compiles them: {error}")

    def _path(self, sig: Any) -> Path:
        return version_folder() / f"{self._name}-{hashlib.sha256(str(sig).encode()).hexdigest()[:8]}"

    def _read(self, sig: Any) -> bytes | None:
        path = self._path(sig)
        try:
            stored = path.read_bytes()
        except OSError:
            return None
        digest, content = stored[:_DIGEST], stored[_DIGEST:]
        if hashlib.sha256(content).digest() == digest:
            return content
        log.warning("%s is damaged; the kernel is compiled again", path)
        return None


@cache
def _tell_once(message: str) -> None:
    log.warning(message)
