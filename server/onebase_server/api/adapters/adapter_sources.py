"""Where a new adapter's files come from: a folder below the allowed root, uploaded files, or an uploaded zip.

Each is a function that stages the files, to be called in a thread.
"""

import zipfile
import zlib
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from onebase_adapters.errors import AdapterFormatError, AdapterPathError
from onebase_adapters.store.adapter_store import AdapterStore, StagedAdapter, Vocabulary

Stage = Callable[[], StagedAdapter]

_MOST_MEMBERS = 64


def from_path(store: AdapterStore, vocabulary: Vocabulary, root: Path | None, path: str) -> Stage:
    """A folder on the server. Raises AdapterPathError, then or when called."""
    if root is None:
        raise AdapterPathError(
            "This server takes no adapters by path: start it with --adapter-root, or upload the files.",
            field="path",
        )
    if "\0" in path:
        raise AdapterPathError("A path cannot hold a zero byte.", field="path")

    def stage() -> StagedAdapter:
        # Resolved first: neither `..` nor a symbolic link leads out. What is outside is told apart from what does
        # not exist only below the root.
        top = root.resolve()
        try:
            folder = (top / path).resolve()
        except (OSError, RuntimeError) as error:  # a loop of links, a name too long
            raise AdapterPathError(f"{path!r} cannot be resolved.", field="path") from error
        if not folder.is_relative_to(top):
            raise AdapterPathError(f"{path!r} is outside the adapter root.", field="path")
        return store.stage(folder, vocabulary=vocabulary, root=top)

    return stage


def from_files(store: AdapterStore, vocabulary: Vocabulary, files: Mapping[str, BinaryIO]) -> Stage:
    """Uploaded files by name."""
    if len(files) == 1:
        name, only = next(iter(files.items()))
        if name.endswith(".zip"):
            return lambda: _stage_zip(store, vocabulary, only)
    return lambda: store.stage_files(files, vocabulary=vocabulary)


def _stage_zip(store: AdapterStore, vocabulary: Vocabulary, file: BinaryIO) -> StagedAdapter:
    try:
        with zipfile.ZipFile(file) as archive, ExitStack() as opened:
            members: dict[str, BinaryIO] = {}
            if len(archive.infolist()) > _MOST_MEMBERS:
                raise AdapterFormatError(f"The archive has more than {_MOST_MEMBERS} files.", field="file")
            for info in archive.infolist():
                # By base name: an archive may hold the files in a folder.
                name = PurePosixPath(info.filename).name
                if info.is_dir() or info.filename.startswith("__MACOSX/"):
                    continue
                if name in members:
                    raise AdapterFormatError(f"The archive has two files named {name!r}.", field="file")
                members[name] = opened.enter_context(archive.open(info))  # type: ignore[assignment]
            return store.stage_files(members, vocabulary=vocabulary)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        # RuntimeError: the archive is encrypted.
        raise AdapterFormatError(f"The archive cannot be read: {error}.", field="file") from error
