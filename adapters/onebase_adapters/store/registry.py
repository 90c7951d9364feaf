"""The names of adapters and their versions, in SQLite: which files each stands for, and which version is current.

A name's rows are its versions; a change is one transaction, so that a reader sees the old state or the new.
"""

import json
import re
import sqlite3
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from onebase_adapters.errors import (
    AdapterError,
    AdapterExistsError,
    AdapterFormatError,
    AdapterNotFoundError,
    StorageError,
)

# `@` cannot be in a name, so that `name@version` means one of its versions.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,127}")

_SCHEMA_VERSION = 2
_SCHEMA = f"""
BEGIN IMMEDIATE;
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
CREATE TABLE IF NOT EXISTS names (
    name TEXT PRIMARY KEY,
    current INTEGER NOT NULL,
    previous INTEGER,
    newest INTEGER NOT NULL
) STRICT;
INSERT OR IGNORE INTO names SELECT name, MAX(version), NULL, MAX(version) FROM versions GROUP BY name;
PRAGMA user_version = {_SCHEMA_VERSION};
COMMIT;
"""
_SELECT = (
    "SELECT name, version, version = current, digest, base, source, created, info, metrics "
    "FROM versions JOIN names USING (name)"
)


@dataclass(frozen=True)
class AdapterRecord:
    """One version of a registered adapter."""

    name: str
    version: int
    """From 1; no number is given twice."""
    current: bool
    """Whether the name alone means this one."""
    digest: str
    base: str
    """Fingerprint of the base it was registered for."""
    source: str
    """Where it came from: a path, or `upload`."""
    created: float
    """Seconds since the epoch."""
    info: Mapping[str, Any]
    """The findings of lowering (method, rank, sizes)."""
    metrics: Mapping[str, Any] | None
    """The training run's, where our trainer made the adapter."""
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


class Registry:
    """The rows. Any thread may call it; several processes may have it open. Every method raises StorageError."""

    def __init__(self, path: Path, objects: Path) -> None:
        """Open, or make, the registry at `path`; `objects` is where the files are, by digest."""
        self._objects = objects
        self._lock = threading.RLock()
        self._db = _open(path)

    def close(self) -> None:
        """Let go of the file."""
        with self._lock:
            self._db.close()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """One transaction that excludes every other writer, in this process or another."""
        with self._lock, _errors():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    def all(self) -> list[AdapterRecord]:
        """Every version, by name and version."""
        return self._read("ORDER BY name, version")

    def versions(self, name: str) -> list[AdapterRecord]:
        """The versions of a name, oldest first."""
        return self._read("WHERE name = ? ORDER BY version", name)

    def get(self, name: str, version: int | None = None) -> AdapterRecord:
        """A version, or the current one. Raises AdapterNotFoundError."""
        if version is None:
            found = self._read("WHERE name = ? AND version = current", name)
        else:
            found = self._read("WHERE name = ? AND version = ?", name, version)
        if found:
            return found[0]
        versions = [str(record.version) for record in self.versions(name)]
        if not versions:
            raise AdapterNotFoundError(f"No adapter is named {name[:160]!r}.", field="name")
        raise AdapterNotFoundError(
            f"{name!r} has no version {version}. It has: {', '.join(versions)}.", field="version"
        )

    def uses(self, digest: str) -> bool:
        """Whether any version is these files."""
        with self._lock, _errors():
            found = self._db.execute("SELECT 1 FROM versions WHERE digest = ? LIMIT 1", (digest,)).fetchone()
        return found is not None

    def add(self, record: AdapterRecord, *, replace: bool, promote: bool) -> AdapterRecord:
        """Within `writing`: a new name, or with `replace` the next version of one. Raises AdapterExistsError."""
        taken = self._db.execute("SELECT newest FROM names WHERE name = ?", (record.name,)).fetchone()
        if taken and not replace:
            raise AdapterExistsError(
                f"The name {record.name!r} is taken: send replace to make a new version of it, delete it first, or "
                "choose another.",
                field="name",
            )
        version = taken[0] + 1 if taken else 1
        self._db.execute(
            "INSERT INTO versions VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (
                record.name,
                version,
                record.digest,
                record.base,
                record.source,
                record.created,
                json.dumps(dict(record.info)),
                json.dumps(record.metrics) if record.metrics is not None else None,
            ),
        )
        if taken:
            self._db.execute("UPDATE names SET newest = ? WHERE name = ?", (version, record.name))
            if promote:
                return self.promote(record.name, version)
        else:
            self._db.execute("INSERT INTO names VALUES (?, ?, NULL, ?)", (record.name, version, version))
        return self.get(record.name, version)

    def promote(self, name: str, version: int | None) -> AdapterRecord:
        """Within `writing`: make a version the current one; None is the one before the last change.

        Raises AdapterNotFoundError, or AdapterError if there was none before."""
        current = self.get(name).version
        if version is None:
            (version,) = self._db.execute("SELECT previous FROM names WHERE name = ?", (name,)).fetchone()
            if version is None:
                raise AdapterError(f"{name!r} has no earlier version to go back to.", field="name")
        wanted = self.get(name, version)
        if wanted.current:
            return wanted
        self._db.execute("UPDATE names SET current = ?, previous = ? WHERE name = ?", (version, current, name))
        return replace(wanted, current=True)

    def delete(self, name: str, version: int | None) -> list[AdapterRecord]:
        """Within `writing`: forget a name, or one version that is not the current one; returns what is gone.

        Raises AdapterNotFoundError, or AdapterError."""
        if version is None:
            gone = self.versions(name)
            if not gone:
                raise AdapterNotFoundError(f"No adapter is named {name[:160]!r}.", field="name")
            self._db.execute("DELETE FROM versions WHERE name = ?", (name,))
            self._db.execute("DELETE FROM names WHERE name = ?", (name,))
            return gone
        record = self.get(name, version)
        if record.current:
            raise AdapterError(
                f"Version {version} is the current one of {name!r}: promote another first, or delete the name.",
                field="version",
            )
        self._db.execute("DELETE FROM versions WHERE name = ? AND version = ?", (name, version))
        self._db.execute("UPDATE names SET previous = NULL WHERE name = ? AND previous = ?", (name, version))
        return [record]

    def _read(self, condition: str, *values: object) -> list[AdapterRecord]:
        with self._lock, _errors():
            rows = self._db.execute(f"{_SELECT} {condition}", values).fetchall()
        return [self._record(row) for row in rows]

    def _record(self, row: tuple[Any, ...]) -> AdapterRecord:
        name, version, current, digest, base, source, created, info, metrics = row
        return AdapterRecord(
            name=name,
            version=version,
            current=bool(current),
            digest=digest,
            base=base,
            source=source,
            created=created,
            info=json.loads(info),
            metrics=json.loads(metrics) if metrics is not None else None,
            folder=self._objects / digest,
        )


def _open(path: Path) -> sqlite3.Connection:
    with _errors():
        # Autocommit: transactions are begun and ended by hand, in `writing`.
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
def _errors() -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        raise StorageError(f"The adapter registry failed: {error}.") from error
