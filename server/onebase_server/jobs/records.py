"""The records of files and jobs: plain values."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Status = Literal["queued", "running", "paused", "succeeded", "failed", "cancelled"]
Level = Literal["info", "warn", "error"]
ENDED: tuple[Status, ...] = ("succeeded", "failed", "cancelled")


@dataclass(frozen=True)
class StoredFile:
    """An uploaded file, or a job's result."""

    id: str
    name: str
    purpose: str
    bytes: int
    created: float
    """Seconds since the epoch."""
    path: Path
    expires: float | None = None
    """When it is to be forgotten, in seconds since the epoch."""


@dataclass(frozen=True)
class JobSpec:
    """The work that a job is to do."""

    training_file: str
    """Id of a file."""
    name: str
    """The name that its result is registered under; empty: the job's id."""
    method: str
    validation_file: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    """The trainer's settings, as `written_settings` reads them."""
    request: Mapping[str, Any] = field(default_factory=dict)
    """The part of its request that the client is shown again."""
    base: str = ""
    """The model that is trained on, as `onebase serve` was told it; empty in jobs from before this was kept."""


@dataclass(frozen=True)
class Job:
    """A job and what has become of it."""

    id: str
    spec: JobSpec
    created: float
    status: Status = "queued"
    finished: float | None = None
    model: str | None = None
    """The result's name, with its version where the name had one before."""
    error: str | None = None
    result_file: str | None = None
    seconds_left: float | None = None
    """Seconds that a running job still needs, as it was told last."""
    told: float = 0.0
    """When that was, in seconds since the epoch."""


@dataclass(frozen=True)
class JobEvent:
    """Something that happened to a job."""

    job: str
    number: int
    """From 1, in order."""
    created: float
    level: Level
    kind: Literal["message", "metrics"]
    message: str
    data: Mapping[str, Any] = field(default_factory=dict)
