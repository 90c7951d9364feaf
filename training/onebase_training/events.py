"""What a run tells while it goes on: plain values, for a terminal, a log or a server to show."""

from collections.abc import Callable
from dataclasses import dataclass


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
    """What is counted, in the plural."""


@dataclass(frozen=True)
class Step:
    """An optimiser step is done."""

    step: int
    steps: int
    loss: float
    """Mean over the step's learned tokens, in nats."""
    learning_rate: float
    tokens_per_second: float
    """Of all tokens, since training began; evaluations left out."""
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


def silent(_: Event) -> None:
    """Tells nobody."""
