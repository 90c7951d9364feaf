"""Where registered adapters live: objects named by their digest, and a SQLite registry that names them.

An object is placed (one rename) before a row speaks of it, and a row goes before its object does. So a kill at
any moment leaves the old state or the new, and at worst an object that no row names, swept at the next opening.
"""

import fcntl
import hashlib
import json
import os
import re
import shutil
import sqlite3
import stat
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from onebase_adapters.errors import (
    AdapterExistsError,
    AdapterFormatError,
    AdapterNotFoundError,
    AdapterPathError,
    StorageError,
)
from onebase_adapters.paths import disk_errors

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
SIDECAR_FILE = "onebase.json"

_WANTED = (CONFIG_FILE, WEIGHTS_FILE, SIDECAR_FILE)
_REQUIRED = (CONFIG_FILE, WEIGHTS_FILE)
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
_MAX_JSON_BYTES = 4 << 20
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,127}")

# A name's rows are its versions; `@` cannot be in a name, so `name@version` stays free to mean one of them.
_SCHEMA = """
CREATE TABLE IF NOT EXISTS versions (
    name TEXT NOT NULL,
    version INTEGER NOT NULL,
    digest TEXT NOT NULL,
    base TEXT NOT NULL,
    source TEXT NOT NULL,
    created REAL NOT NULL,
    info TEXT NOT NULL,
    metrics TEXT,
    PRIMARY KEY (name, version)
) STRICT;
CREATE INDEX IF NOT EXISTS versions_by_digest ON versions (digest);
PRAGMA user_version = 1;
"""
_SCHEMA_VERSION = 1
_COLUMNS = "name, version, digest, base, source, created, info, metrics"


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


@dataclass(frozen=True)
class AdapterRecord:
    """One registered adapter."""

    name: str
    version: int
    digest: str
    base: str
    """Fingerprint of the base it was registered for."""
    source: str
    """Where it came from: a path, or `upload`."""
    created: float
    """Seconds since the epoch."""
    info: Mapping[str, Any]
    """What lowering found (method, rank, sizes)."""
    metrics: Mapping[str, Any] | None
    """Of the training run, where our trainer made it."""
    folder: Path


def check_name(name: str) -> str:
    """Return `name` if an adapter may have it. Raises AdapterFormatError."""
    if not _NAME.fullmatch(name) or ".." in name or "//" in name or name.endswith("/"):
        raise AdapterFormatError(
            f"{name[:160]!r} cannot be an adapter's name: use 1 to 128 letters, digits and . _ : / -, starting "
            "with a letter or digit, without '..' or '//'.",
            field="name",
        )
    return name


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
        self._lock = threading.RLock()
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
            self._db = _open_registry(root / "registry.sqlite3")
        except StorageError:
            self._lock_file.close()
            raise
        self._sweep_if_alone()

    def close(self) -> None:
        """Let go of the registry and the lock."""
        with self._lock:
            self._db.close()
            self._lock_file.close()

    def stage(self, folder: Path) -> StagedAdapter:
        """Copy an adapter's files from `folder` into the store.

        Raises AdapterPathError (no folder, symbolic links), AdapterFormatError (files missing, a pickle, too
        large) or StorageError.
        """
        try:
            if not folder.is_dir():
                raise AdapterPathError(f"{folder} is not a folder.", field="path")
            names = sorted(entry.name for entry in folder.iterdir())
        except OSError as error:  # no permission, a name too long
            raise AdapterPathError(f"Cannot read {str(folder)[:160]}: {error.strerror}.", field="path") from error
        _check_listing(names)
        files: dict[str, BinaryIO] = {}
        try:
            for name in _WANTED:
                if name in _REQUIRED or (folder / name).exists():
                    files[name] = _open_plain(folder / name)
            return self.stage_files(files, source=str(folder))
        finally:
            for file in files.values():
                file.close()

    def stage_files(self, files: Mapping[str, BinaryIO], *, source: str = "upload") -> StagedAdapter:
        """As `stage`, from open files by name. Files of other names are left out.

        Raises AdapterFormatError or StorageError.
        """
        _check_listing(sorted(files))
        with disk_errors(str(self._staging)):
            scratch = Path(tempfile.mkdtemp(dir=self._staging))
        try:
            with disk_errors(str(scratch)):
                digest = self._copy(files, scratch)
            sidecar = {name: _read_object(scratch / name) for name in _WANTED if name.endswith(".json")}
            folder = self._place(scratch, digest)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        return StagedAdapter(digest, folder, source, sidecar[SIDECAR_FILE])

    def commit(self, name: str, staged: StagedAdapter, info: Mapping[str, Any], *, base: str) -> AdapterRecord:
        """Give the staged adapter a name; afterwards it is registered, whatever happens.

        Raises AdapterFormatError (bad name), AdapterExistsError or StorageError; the stage is then still held.
        """
        check_name(name)
        metrics = staged.sidecar.get("metrics")
        row = (
            name,
            1,
            staged.digest,
            base,
            staged.source,
            time.time(),
            json.dumps(dict(info)),
            json.dumps(metrics) if isinstance(metrics, dict) else None,
        )
        with self._writing() as db:
            if db.execute("SELECT 1 FROM versions WHERE name = ?", (name,)).fetchone():
                raise AdapterExistsError(
                    f"The name {name!r} is taken; delete it first, or choose another.", field="name"
                )
            if not staged.folder.is_dir():
                raise StorageError(f"{staged.folder} has vanished; register the adapter again.")
            db.execute(f"INSERT INTO versions ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?)", row)
        self._let_go(staged.digest)
        return self._record(row)

    def discard(self, staged: StagedAdapter) -> None:
        """Drop a stage that will not be committed, with its files if nothing else uses them."""
        self._let_go(staged.digest)
        self.remove_unused(staged.digest)

    def list(self) -> list[AdapterRecord]:
        """All registered adapters, by name. Raises StorageError."""
        with self._lock, _registry_errors():
            rows = self._db.execute(f"SELECT {_COLUMNS} FROM versions ORDER BY name, version").fetchall()
        return [self._record(row) for row in rows]

    def get(self, name: str) -> AdapterRecord:
        """The adapter of this name. Raises AdapterNotFoundError or StorageError."""
        with self._lock, _registry_errors():
            row = self._db.execute(
                f"SELECT {_COLUMNS} FROM versions WHERE name = ? ORDER BY version DESC LIMIT 1", (name,)
            ).fetchone()
        if row is None:
            raise AdapterNotFoundError(f"No adapter is named {name!r}.", field="name")
        return self._record(row)

    def delete(self, name: str, *, keep_files: bool = False) -> AdapterRecord:
        """Forget the name, and remove its files unless another name uses them.

        `keep_files` leaves them until `remove_unused`, for requests that still run on them. Raises
        AdapterNotFoundError or StorageError.
        """
        record = self.get(name)
        with self._writing() as db:
            db.execute("DELETE FROM versions WHERE name = ?", (name,))
        if not keep_files:
            self.remove_unused(record.digest)
        return record

    def in_use(self, digest: str) -> bool:
        """Whether any name points to these files. Raises StorageError."""
        with self._lock, _registry_errors():
            found = self._db.execute("SELECT 1 FROM versions WHERE digest = ? LIMIT 1", (digest,)).fetchone()
        return found is not None

    def remove_unused(self, digest: str) -> None:
        """Remove these files unless a name or a stage uses them. Raises StorageError."""
        # In a write transaction, so that no other process can commit a name for it in between. Moved aside
        # first: a kill in the middle of removing must not leave half an object in place.
        with self._writing() as db:
            used = db.execute("SELECT 1 FROM versions WHERE digest = ? LIMIT 1", (digest,)).fetchone()
            folder = self._objects / digest
            if used or self._held[digest] > 0 or not folder.is_dir():
                return
            with disk_errors(str(self._staging)):
                aside = Path(tempfile.mkdtemp(dir=self._staging))
                folder.replace(aside / digest)
        shutil.rmtree(aside, ignore_errors=True)

    def _record(self, row: tuple[Any, ...]) -> AdapterRecord:
        name, version, digest, base, source, created, info, metrics = row
        return AdapterRecord(
            name=name,
            version=version,
            digest=digest,
            base=base,
            source=source,
            created=created,
            info=json.loads(info),
            metrics=json.loads(metrics) if metrics is not None else None,
            folder=self._objects / digest,
        )

    def _copy(self, files: Mapping[str, BinaryIO], scratch: Path) -> str:
        """Copy the wanted files and flush them to the disk; returns the digest of what was copied."""
        total = hashlib.sha256()
        left = self._max_bytes
        for name in _WANTED:
            if name not in files:
                continue
            limit = min(left, _MAX_JSON_BYTES) if name.endswith(".json") else left
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
        with self._writing(), disk_errors(str(folder)):
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

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """One transaction that excludes every other writer, in this process or another."""
        with self._lock, _registry_errors():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise


def _open_registry(path: Path) -> sqlite3.Connection:
    with _registry_errors():
        # Autocommit: transactions are begun and ended by hand, in `_writing`.
        db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=30)
        try:
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = FULL")
            (found,) = db.execute("PRAGMA user_version").fetchone()
            if found > _SCHEMA_VERSION:
                raise StorageError(f"{path} was written by a newer OneBase (schema {found}); upgrade this one.")
            if found < _SCHEMA_VERSION:
                db.executescript(_SCHEMA)
        except (sqlite3.Error, StorageError):
            db.close()
            raise
    return db


@contextmanager
def _registry_errors() -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        raise StorageError(f"The adapter registry failed: {error}.") from error


def _check_listing(names: list[str]) -> None:
    """Refuse a folder or an upload by its file names alone. Raises AdapterFormatError."""
    if CONFIG_FILE not in names:
        raise AdapterFormatError(f"No {CONFIG_FILE}: this is not a PEFT adapter.", field="path")
    if WEIGHTS_FILE in names:
        return
    pickles = [name for name in names if name.endswith(_PICKLES)]
    if pickles:
        raise AdapterFormatError(
            f"{pickles[0]} is a pickle, which can run code when it is read. Save the adapter again with "
            "save_pretrained(..., safe_serialization=True).",
            field="path",
        )
    raise AdapterFormatError(f"No {WEIGHTS_FILE}.", field="path")


def _open_plain(path: Path) -> BinaryIO:
    """Open a regular file and nothing else: a link could lead out of the folder, a pipe could wait forever."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        if path.is_symlink():
            raise AdapterPathError(
                f"{path.name} is a symbolic link; register a copy with real files (cp -rL).", field="path"
            ) from error
        raise AdapterPathError(f"Cannot read {path}: {error.strerror}.", field="path") from error
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise AdapterPathError(f"{path.name} is not a regular file.", field="path")
    return os.fdopen(handle, "rb")


def _read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty if there is no such file. Raises AdapterFormatError."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise AdapterFormatError(f"{path.name} is not JSON: {error}.", field="path") from error
    if not isinstance(value, dict):
        raise AdapterFormatError(f"{path.name} is not a JSON object.", field="path")
    return value


def _fsync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
