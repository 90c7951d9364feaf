"""Where OneBase keeps things, and how it writes them: a kill at any moment leaves the old state or the new."""

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from onebase_adapters.errors import StorageError


def cache_home() -> Path:
    """Downloads and conversions, safe to delete: `$ONEBASE_CACHE`, else the user's cache directory."""
    chosen = os.environ.get("ONEBASE_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "onebase"


def data_home() -> Path:
    """What must survive (the adapter store): `$ONEBASE_HOME`, else the user's data directory."""
    chosen = os.environ.get("ONEBASE_HOME")
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_DATA_HOME") or "~/.local/share").expanduser() / "onebase"


@contextmanager
def disk_errors(what: str) -> Iterator[None]:
    """Turn the operating system's refusals to write into a `StorageError` that says what was being written."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            reason = "no space left on the disk"
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            reason = "no permission to write"
        elif error.errno in (errno.ENOTDIR, errno.EEXIST):
            reason = "part of the path is a file, not a folder"
        else:
            raise
        raise StorageError(f"Cannot write {what}: {reason} ({error.filename or 'unknown path'}).") from error


@contextmanager
def staged_directory(target: Path) -> Iterator[Path]:
    """A scratch directory beside `target` that takes its place when the block ends well, else vanishes.

    An existing `target` is replaced. Raises StorageError where the disk refuses.
    """
    with disk_errors(str(target)):
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
        scratch.chmod(0o755)
        try:
            yield scratch
            if target.exists():
                shutil.rmtree(target)
            scratch.replace(target)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
