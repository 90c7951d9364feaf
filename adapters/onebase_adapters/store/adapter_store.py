"""Where registered adapters live: objects named by their digest, and a registry that names them.

An object is placed (one rename) before a row speaks of it, and a row goes before its object does. So a kill at
any moment leaves the old state or the new, and at worst an object that no row names, swept at the next opening.
"""

import builtins
import fcntl
import hashlib
import io
import json
import os
import shutil
import stat
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from onebase_adapters.atomic_files import disk_errors
from onebase_adapters.errors import AdapterFormatError, AdapterPathError, StorageError
from onebase_adapters.formats.chat_template import CHAT_TEMPLATE_FILE, SETTINGS_FILE, template_in
from onebase_adapters.formats.checks import TOKENIZER_FILES, check_listing, check_vocabulary
from onebase_adapters.formats.peft_folder import CONFIG_FILE, SIDECAR_FILE, read_object
from onebase_adapters.store.registry import AdapterRecord, Registry, check_name

_NOTES = (CONFIG_FILE, SIDECAR_FILE)
_MAX_JSON_BYTES = 4 << 20
_MAX_TOKENIZER_BYTES = 64 << 20

Vocabulary = Callable[[], Mapping[str, int]]
"""The base's tokens with their numbers, made when they are needed."""


@dataclass(frozen=True)
class StagedAdapter:
    """Files copied into the store, whole and on disk, that no name points to yet: commit or discard it."""

    digest: str
    """SHA-256 over the files' names and contents."""
    folder: Path
    """Where they are, and stay once committed."""
    source: str
    sidecar: Mapping[str, Any]
    """Our trainer's notes (`onebase.json`); empty for a foreign adapter."""


class AdapterStore:
    """The adapters under one root. Any thread may call it; several processes may have it open."""

    def __init__(self, root: Path, *, max_bytes: int = 16 << 30) -> None:
        """Open, or make, the store. `max_bytes` is the most one adapter may take.

        Raises StorageError.
        """
        self._root = root
        self._objects = root / "objects"
        self._staging = root / "staging"
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._held: Counter[str] = Counter()
        """Digests that are staged and neither committed nor discarded: their objects must stay."""
        with disk_errors(str(root)):
            try:
                self._objects.mkdir(parents=True, exist_ok=True)
                self._staging.mkdir(exist_ok=True)
            except (FileExistsError, NotADirectoryError) as error:
                raise StorageError(f"{root} cannot be an adapter store: {error}.") from error
            self._lock_file = (root / "lock").open("a")
        try:
            self._registry = Registry(root / "registry.sqlite3", self._objects)
        except StorageError:
            self._lock_file.close()
            raise
        self._sweep_if_alone()

    def close(self) -> None:
        """Let go of the registry and the lock."""
        self._registry.close()
        self._lock_file.close()

    def stage(
        self, folder: Path, *, vocabulary: Vocabulary | None = None, root: Path | None = None
    ) -> StagedAdapter:
        """Copy an adapter's files from `folder` into the store. A tokenizer among them must be `vocabulary`'s.
        Symbolic links are followed below `root`, as a hub's cache has them.

        Raises AdapterPathError (no folder, other links), AdapterFormatError (files missing, a pickle, too large),
        AdapterMismatchError (another tokenizer) or StorageError.
        """
        try:
            if not folder.is_dir():
                raise AdapterPathError(f"{folder} is not a folder.", field="path")
            names = sorted(entry.name for entry in folder.iterdir())
        except OSError as error:  # no permission, a name too long
            raise AdapterPathError(f"Cannot read {str(folder)[:160]}: {error.strerror}.", field="path") from error
        files: dict[str, BinaryIO] = {}
        try:
            for name in (*check_listing(names), *_NOTES, *TOKENIZER_FILES, CHAT_TEMPLATE_FILE):
                if name in names:
                    files[name] = _open_plain(folder / name, root)
            return self.stage_files(files, source=str(folder), vocabulary=vocabulary)
        finally:
            for file in files.values():
                file.close()

    def stage_files(
        self, files: Mapping[str, BinaryIO], *, source: str = "upload", vocabulary: Vocabulary | None = None
    ) -> StagedAdapter:
        """As `stage`, from open files by name. Files of other names are left out.

        Raises AdapterFormatError, AdapterMismatchError or StorageError.
        """
        check_listing(files)
        if vocabulary is not None:
            _check_tokenizer(files, vocabulary)
        files = _with_chat_template(files)
        with disk_errors(str(self._staging)):
            scratch = Path(tempfile.mkdtemp(dir=self._staging))
        try:
            with disk_errors(str(scratch)):
                digest = self._copy(files, scratch)
            sidecar = {name: read_object(scratch / name) for name in _NOTES}
            folder = self._place(scratch, digest)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        return StagedAdapter(digest, folder, source, sidecar[SIDECAR_FILE])

    def commit(
        self,
        name: str,
        staged: StagedAdapter,
        info: Mapping[str, Any],
        *,
        base: str,
        replace: bool = False,
        promote: bool = True,
    ) -> AdapterRecord:
        """Give the staged adapter a name; afterwards it is registered, whatever happens.

        With `replace` a name that is taken gets a new version, which is the current one from then on if it is to be
        promoted. Raises AdapterFormatError (bad name), AdapterExistsError or StorageError; the stage is then still
        held.
        """
        check_name(name)
        metrics = staged.sidecar.get("metrics")
        record = AdapterRecord(
            name=name,
            version=0,
            current=False,
            digest=staged.digest,
            base=base,
            source=staged.source,
            created=time.time(),
            info=info,
            metrics=metrics if isinstance(metrics, dict) else None,
            folder=staged.folder,
        )
        with self._registry.writing():
            if not staged.folder.is_dir():
                raise StorageError(f"{staged.folder} has vanished; register the adapter again.")
            record = self._registry.add(record, replace=replace, promote=promote)
        self._let_go(staged.digest)
        return record

    def discard(self, staged: StagedAdapter) -> None:
        """Drop a stage that will not be committed, with its files if nothing else uses them."""
        self._let_go(staged.digest)
        self.remove_unused(staged.digest)

    def list(self) -> list[AdapterRecord]:
        """All versions of all registered adapters, by name and version. Raises StorageError."""
        return self._registry.all()

    def versions(self, name: str) -> builtins.list[AdapterRecord]:
        """The versions of a name, oldest first; none if it does not exist. Raises StorageError."""
        return self._registry.versions(name)

    def get(self, name: str, version: int | None = None) -> AdapterRecord:
        """A version of an adapter, or its current one. Raises AdapterNotFoundError or StorageError."""
        return self._registry.get(name, version)

    def promote(self, name: str, version: int | None) -> AdapterRecord:
        """Make a version the current one; None is the one that was current before the last change.

        Raises AdapterNotFoundError, AdapterError (there was none before) or StorageError.
        """
        with self._registry.writing():
            return self._registry.promote(name, version)

    def delete(
        self, name: str, version: int | None = None, *, keep_files: bool = False
    ) -> builtins.list[AdapterRecord]:
        """Forget the name, or one version of it, and remove its files unless something else uses them.

        `keep_files` leaves them until `remove_unused`, for requests that still run on them. Raises
        AdapterNotFoundError, AdapterError (the version is the current one) or StorageError.
        """
        with self._registry.writing():
            records = self._registry.delete(name, version)
        if not keep_files:
            for digest in {record.digest for record in records}:
                self.remove_unused(digest)
        return records

    def in_use(self, digest: str) -> bool:
        """Whether any name points to these files. Raises StorageError."""
        return self._registry.uses(digest)

    def remove_unused(self, digest: str) -> None:
        """Remove these files unless a name or a stage uses them. Raises StorageError."""
        # In a write transaction, so that no other process can commit a name for it in between. Moved aside
        # first: a kill in the middle of removing must not leave half an object in place.
        with self._registry.writing(), self._lock:
            folder = self._objects / digest
            if self._registry.uses(digest) or self._held[digest] > 0 or not folder.is_dir():
                return
            with disk_errors(str(self._staging)):
                aside = Path(tempfile.mkdtemp(dir=self._staging))
                folder.replace(aside / digest)
        shutil.rmtree(aside, ignore_errors=True)

    def _copy(self, files: Mapping[str, BinaryIO], scratch: Path) -> str:
        """Copy the wanted files and flush them to the disk; returns the digest of what was copied."""
        total = hashlib.sha256()
        left = self._max_bytes
        for name in (CONFIG_FILE, *check_listing(files), SIDECAR_FILE, CHAT_TEMPLATE_FILE):
            if name not in files:
                continue
            limit = min(left, _MAX_JSON_BYTES) if name.endswith((".json", ".jinja")) else left
            digest = hashlib.sha256()
            size = 0
            with (scratch / name).open("wb") as out:
                while block := files[name].read(1 << 20):
                    size += len(block)
                    if size > limit:
                        raise AdapterFormatError(f"{name} is larger than {limit} bytes.", field="path")
                    digest.update(block)
                    out.write(block)
                out.flush()
                os.fsync(out.fileno())
            left -= size
            total.update(f"{name}\0{digest.hexdigest()}\0".encode())
        _fsync_folder(scratch)
        return total.hexdigest()

    def _place(self, scratch: Path, digest: str) -> Path:
        """Move a whole copy to its object's place, unless the same content is there already."""
        folder = self._objects / digest
        with self._registry.writing(), self._lock, disk_errors(str(folder)):
            if not folder.is_dir():
                scratch.replace(folder)
                folder.chmod(0o755)
                _fsync_folder(self._objects)
            self._held[digest] += 1
        return folder

    def _let_go(self, digest: str) -> None:
        with self._lock:
            self._held[digest] -= 1
            if self._held[digest] <= 0:
                del self._held[digest]

    def _sweep_if_alone(self) -> None:
        """Remove what a kill left behind, unless another process has the store open: it may be staging."""
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fcntl.flock(self._lock_file, fcntl.LOCK_SH)
            return
        named = {record.digest for record in self.list()}
        for scratch in self._staging.iterdir():
            shutil.rmtree(scratch, ignore_errors=True)
        for folder in self._objects.iterdir():
            if folder.name not in named:
                shutil.rmtree(folder, ignore_errors=True)
        fcntl.flock(self._lock_file, fcntl.LOCK_SH)


def _with_chat_template(files: Mapping[str, BinaryIO]) -> Mapping[str, BinaryIO]:
    """With the template as a file of its own where it is among the tokenizer's settings."""
    if CHAT_TEMPLATE_FILE in files or SETTINGS_FILE not in files:
        return files
    files[SETTINGS_FILE].seek(0)
    try:
        settings = json.loads(files[SETTINGS_FILE].read(_MAX_TOKENIZER_BYTES))
    except ValueError as error:
        raise AdapterFormatError(f"{SETTINGS_FILE} is not JSON: {error}.", field="path") from error
    template = template_in(settings) if isinstance(settings, dict) else None
    if template is None:
        return files
    try:
        return {**files, CHAT_TEMPLATE_FILE: io.BytesIO(template.encode())}
    except UnicodeEncodeError as error:
        raise AdapterFormatError(
            f"The chat_template in {SETTINGS_FILE} is no text: {error}.", field="path"
        ) from error


def _check_tokenizer(files: Mapping[str, BinaryIO], vocabulary: Vocabulary) -> None:
    found: dict[str, bytes] = {}
    for name in TOKENIZER_FILES:
        if name in files:
            found[name] = files[name].read(_MAX_TOKENIZER_BYTES + 1)
            if len(found[name]) > _MAX_TOKENIZER_BYTES:
                raise AdapterFormatError(f"{name} is larger than {_MAX_TOKENIZER_BYTES} bytes.", field="path")
    if found:
        check_vocabulary(found, vocabulary())


def _open_plain(path: Path, root: Path | None) -> BinaryIO:
    """Open a regular file and nothing else: a link could lead out of `root`, a pipe could wait forever."""
    if root is not None and path.is_symlink():
        target = path.resolve()
        path = target if target.is_relative_to(root.resolve()) else path
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        if path.is_symlink():
            raise AdapterPathError(
                f"{path.name} is a symbolic link that leads out of the adapter root; register a copy with real "
                "files (cp -rL).",
                field="path",
            ) from error
        raise AdapterPathError(f"Cannot read {path}: {error.strerror}.", field="path") from error
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise AdapterPathError(f"{path.name} is not a regular file.", field="path")
    return os.fdopen(handle, "rb")


def _fsync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
