"""Events of a run while it goes on: plain values, for a terminal, a log or a server to show."""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TextIO


@dataclass(frozen=True)
class Stage:
    """Something begins, or was decided."""

    text: str


@dataclass(frozen=True)
class Part:
    """So much of the stage that was told last is done."""

    done: int
    of: int
    unit: str
    """The things that are counted, in the plural."""


@dataclass(frozen=True)
class Step:
    """An optimiser step is done."""

    step: int
    steps: int
    loss: float
    """Mean over the step's learned tokens, in nats."""
    learning_rate: float
    tokens_per_second: float
    """Speed over all tokens since training began; evaluations left out."""
    seconds_left: float


@dataclass(frozen=True)
class Evaluated:
    """The held-out part was measured."""

    step: int
    loss: float
    """Mean over its learned tokens, in nats."""
    accuracy: float | None
    """Share of a classification's examples that are answered rightly; None of other tasks."""
    best: bool


Event = Stage | Part | Step | Evaluated
Progress = Callable[[Event], None]


@dataclass(frozen=True)
class Failed:
    """The last word of a run without a result: what is wrong, and the way out."""

    text: str


def silent(_: Event) -> None:
    """Tells nobody."""


_KINDS: Mapping[str, type[Event | Failed]] = {
    kind.__name__.lower(): kind for kind in (Stage, Part, Step, Evaluated, Failed)
}


def read_event(line: bytes) -> Event | Failed | None:
    """Read a line that `json_lines` wrote; None if something else was printed."""
    try:
        values = json.loads(line)
        return _KINDS[values.pop("event")](**values)
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


@contextmanager
def json_lines(stream: TextIO) -> Iterator[Callable[[Event | Failed], None]]:
    """A function that writes each event as one line of JSON, with its kind, for another program to read. How far a
    stage has come is told once a second at most."""
    told = 0.0

    def progress(event: Event | Failed) -> None:
        nonlocal told
        if isinstance(event, Part):
            if time.monotonic() - told < 1:
                return
            told = time.monotonic()
        line = {"event": type(event).__name__.lower(), **asdict(event)}
        print(json.dumps(line, ensure_ascii=False), file=stream, flush=True)

    yield progress
