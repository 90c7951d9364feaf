"""Files and jobs on disk: contents in a folder, the rest in SQLite. A kill leaves the old state or the new."""

import fcntl
import json
import os
import shutil
import sqlite3
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Literal, get_args

from onebase_adapters.atomic_files import disk_errors
from onebase_adapters.errors import OneBaseError, StorageError
from onebase_server.jobs.records import ENDED, Job, JobEvent, JobSpec, Level, Status, StoredFile

_SCHEMA_VERSION = 2
_SCHEMA = f"""
BEGIN IMMEDIATE;
CREATE TABLE IF NOT EXISTS files (
    id TEXT PRIMARY KEY,
    name TEXT NOT NULL,
    purpose TEXT NOT NULL,
    bytes INTEGER NOT NULL,
    created REAL NOT NULL,
    expires REAL
) STRICT;
CREATE TABLE IF NOT EXISTS jobs (
    number INTEGER PRIMARY KEY,
    id TEXT NOT NULL UNIQUE,
    status TEXT NOT NULL,
    job TEXT NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS events (
    job TEXT NOT NULL,
    number INTEGER NOT NULL,
    created REAL NOT NULL,
    level TEXT NOT NULL,
    kind TEXT NOT NULL,
    message TEXT NOT NULL,
    data TEXT NOT NULL,
    PRIMARY KEY (job, number)
) STRICT;
PRAGMA user_version = {_SCHEMA_VERSION};
COMMIT;
"""
_FROM_1 = "BEGIN IMMEDIATE; ALTER TABLE files ADD COLUMN expires REAL; PRAGMA user_version = 2; COMMIT;"


class UnknownFileError(OneBaseError):
    """No file has this id."""


class UnknownJobError(OneBaseError):
    """No job has this id."""


class FileInUseError(OneBaseError):
    """A job still needs the file."""


class JobsElsewhereError(OneBaseError):
    """Another server runs the jobs of this folder."""


class JobBook:
    """Any thread may call it. Every method raises StorageError."""

    def __init__(self, root: Path) -> None:
        """Open, or make, the book in `root`. Of several servers that have it open, the first owns it: it alone runs
        jobs and clears up."""
        self.root = root
        self._contents = root / "files"
        self._lock = threading.RLock()
        with disk_errors(str(root)):
            self._contents.mkdir(parents=True, exist_ok=True)
        with _errors():
            # Autocommit: each statement is a transaction of its own.
            self._db = sqlite3.connect(
                root / "jobs.sqlite3", isolation_level=None, check_same_thread=False, timeout=30
            )
            try:
                self._db.execute("PRAGMA journal_mode = WAL")
                (found,) = self._db.execute("PRAGMA user_version").fetchone()
                if found > _SCHEMA_VERSION:
                    raise StorageError(f"{root} was written by a newer OneBase; upgrade this one.")
                if found == 1:
                    self._db.executescript(_FROM_1)
                self._db.executescript(_SCHEMA)
            except (sqlite3.Error, StorageError):
                self._db.close()
                raise
        self._lock_file = (root / "lock").open("a")
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.owned = False
            return
        self.owned = True
        self._sweep()

    def close(self) -> None:
        """Let go of it."""
        with self._lock:
            self._db.close()
        self._lock_file.close()

    def add_file(self, content: BinaryIO, name: str, purpose: str, *, lifetime: float | None = None) -> StoredFile:
        """Keep a copy of a file under a new id; for `lifetime` seconds, or for good."""
        self._expire()
        # Training reads the format off the end of the name; the rest is the client's, so it stays out of paths.
        suffix = "".join(c for c in PurePosixPath(name).suffix if c.isalnum() or c == ".")[:16]
        file_id = f"file-{uuid.uuid4().hex[:24]}"
        path = self._contents / f"{file_id}{suffix}"
        partial = self._contents / f"{file_id}.partial"
        try:
            with disk_errors(str(path)), partial.open("wb") as out:
                shutil.copyfileobj(content, out, 1 << 20)
                out.flush()
                os.fsync(out.fileno())
            size = partial.stat().st_size
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
        created = time.time()
        expires = None if lifetime is None else created + lifetime
        row = (file_id, name, purpose, size, created, expires)
        self._execute("INSERT INTO files VALUES (?, ?, ?, ?, ?, ?)", *row)
        return self._file(row)

    def file(self, file_id: str) -> StoredFile:
        """Raises UnknownFileError."""
        self._expire()
        rows = self._execute("SELECT * FROM files WHERE id = ?", file_id)
        if not rows:
            raise UnknownFileError(f"No file has the id {file_id[:80]!r}.", field="file_id")
        return self._file(rows[0])

    def files(self) -> list[StoredFile]:
        """All, newest first."""
        self._expire()
        return [self._file(row) for row in self._execute("SELECT * FROM files ORDER BY rowid DESC")]

    def delete_file(self, file_id: str) -> None:
        """Forget a file. Raises UnknownFileError or FileInUseError."""
        stored = self.file(file_id)
        if (job_id := self._needed_by(file_id)) is not None:
            raise FileInUseError(f"Job {job_id} still needs the file; cancel it first.", field="file_id")
        self._forget(stored)

    def add_job(self, spec: JobSpec) -> Job:
        """A new job, queued."""
        job = Job(f"ftjob-{uuid.uuid4().hex[:24]}", spec, time.time())
        self._execute(
            "INSERT INTO jobs (id, status, job) VALUES (?, ?, ?)", job.id, job.status, json.dumps(asdict(job))
        )
        return job

    def job(self, job_id: str) -> Job:
        """Raises UnknownJobError."""
        rows = self._execute("SELECT job FROM jobs WHERE id = ?", job_id)
        if not rows:
            raise UnknownJobError(f"No fine-tuning job has the id {job_id[:80]!r}.", field="fine_tuning_job_id")
        return _job(rows[0][0])

    def jobs(self) -> list[Job]:
        """All, newest first."""
        return [_job(row[0]) for row in self._execute("SELECT job FROM jobs ORDER BY number DESC")]

    def change(self, job_id: str, among: Sequence[Status] = get_args(Status), **values: Any) -> Job:
        """Change a job's fields, if its status is one of `among`. Raises UnknownJobError."""
        with self._lock:
            job = self.job(job_id)
            if job.status not in among:
                return job
            job = replace(job, **values)
            self._execute(
                "UPDATE jobs SET status = ?, job = ? WHERE id = ?", job.status, json.dumps(asdict(job)), job_id
            )
        return job

    def end(self, job_id: str, message: str, *, level: Level, **values: Any) -> Job:
        """End a job by its last event, and change its fields; one that has ended stays as it is. Raises
        UnknownJobError."""
        with self._lock:
            job = self.job(job_id)
            if job.status in ENDED:
                return job
            self.tell(job_id, message, level=level)
            return self.change(job_id, finished=time.time(), seconds_left=None, **values)

    def tell(
        self,
        job_id: str,
        message: str,
        *,
        level: Level = "info",
        kind: Literal["message", "metrics"] = "message",
        data: Mapping[str, Any] | None = None,
    ) -> None:
        """Add an event to a job's history."""
        self._execute(
            "INSERT INTO events SELECT ?, COALESCE(MAX(number), 0) + 1, ?, ?, ?, ?, ? FROM events WHERE job = ?",
            job_id,
            time.time(),
            level,
            kind,
            message,
            json.dumps(data or {}),
            job_id,
        )

    def events(self, job_id: str, *, after: int = 0) -> list[JobEvent]:
        """A job's history from the event after number `after` on, oldest first. Raises UnknownJobError."""
        self.job(job_id)
        rows = self._execute("SELECT * FROM events WHERE job = ? AND number > ? ORDER BY number", job_id, after)
        return [
            JobEvent(job, number, created, level, kind, message, json.loads(data))
            for job, number, created, level, kind, message, data in rows
        ]

    def _execute(self, statement: str, *values: object) -> list[tuple[Any, ...]]:
        with self._lock, _errors():
            return self._db.execute(statement, values).fetchall()

    def _file(self, row: tuple[Any, ...]) -> StoredFile:
        found = sorted(self._contents.glob(f"{row[0]}*"))
        file_id, name, purpose, size, created, expires = row
        path = found[0] if found else self._contents / file_id
        return StoredFile(file_id, name, purpose, size, created, path, expires)

    def _needed_by(self, file_id: str) -> str | None:
        """A job that has not ended and reads the file."""
        waiting = (job for job in self.jobs() if job.status not in ENDED)
        return next((j.id for j in waiting if file_id in (j.spec.training_file, j.spec.validation_file)), None)

    def _forget(self, stored: StoredFile) -> None:
        self._execute("DELETE FROM files WHERE id = ?", stored.id)
        stored.path.unlink(missing_ok=True)

    def _expire(self) -> None:
        """Forget the files whose time is over, but for what jobs still need."""
        for row in self._execute("SELECT * FROM files WHERE expires < ?", time.time()):
            if self._needed_by(row[0]) is None:
                self._forget(self._file(row))

    def _sweep(self) -> None:
        """Remove contents that no row speaks of: a kill came between the two."""
        known = {row[0] for row in self._execute("SELECT id FROM files")}
        for path in self._contents.iterdir():
            if path.name.partition(".")[0] not in known:
                path.unlink(missing_ok=True)


def _job(text: str) -> Job:
    values = json.loads(text)
    return Job(**{**values, "spec": JobSpec(**values["spec"])})


@contextmanager
def _errors() -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        raise StorageError(f"The book of jobs failed: {error}.") from error
