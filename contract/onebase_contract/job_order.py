"""How a server has a process train: an order in, as one JSON value; events out, a line each; an ending by its name.

The process has a program of its own, so that the server never imports what trains.
"""

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import IntEnum
from typing import Any

TRAINING_PROCESS = (sys.executable, "-m", "onebase_training.job_process")
"""The command of a training process; an order follows it as the last argument."""


class Ending(IntEnum):
    """Exit statuses, of the `onebase` command too."""

    DONE = 0
    FAILED = 1
    """An error that was told."""
    STOPPED = 130
    """By Ctrl-C or SIGTERM, as shells have it."""


@dataclass(frozen=True)
class Limits:
    """The resources that a training process may take."""

    nice: int = 19
    """Niceness, 19 at most: it gets the processor time that serving leaves."""
    threads: int | None = None
    """CPU threads; None: all cores."""
    memory: int | None = None
    """Bytes, which the kernel sees to (Linux); None: what there is."""


@dataclass(frozen=True)
class JobOrder:
    """The settings to train with, and the resources to do it in."""

    settings: Mapping[str, Any]
    """As `written_settings` reads them."""
    limits: Limits = field(default_factory=Limits)

    def to_json(self) -> str:
        """For the command line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "JobOrder":
        """Read an order that `to_json` wrote."""
        values = json.loads(text)
        return cls(values["settings"], Limits(**values["limits"]))
