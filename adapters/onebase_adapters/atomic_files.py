"""Where OneBase keeps things, and how it writes them: a kill at any moment leaves the old state or the new."""

import errno
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from onebase_adapters.errors import StorageError


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
        elif error.errno == errno.ENOENT:
            reason = "there is no such folder, and none can be made"
        elif error.errno in (errno.ENOTDIR, errno.EEXIST):
            reason = "part of the path is a file, not a folder"
        else:
            raise
        raise StorageError(f"Cannot write {what}: {reason} ({error.filename or 'unknown path'}).") from error


@contextmanager
def scratch_beside(target: Path) -> Iterator[Path]:
    """A scratch directory on the same disk as `target`, which vanishes when the block ends. Raises StorageError
    where the disk refuses."""
    with disk_errors(str(target)):
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
        scratch.chmod(0o755)
        try:
            yield scratch
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def staged_directory(target: Path) -> Iterator[Path]:
    """A scratch directory beside `target` that takes its place when the block ends well, else vanishes.

    An existing `target` is replaced. Raises StorageError where the disk refuses.
    """
    with scratch_beside(target) as scratch:
        yield scratch
        if target.exists():
            shutil.rmtree(target)
        scratch.replace(target)
