"""Requests that cannot be scheduled yet: their adapter is being read or has no slot, or their grammar is being
compiled. They wait aside in their order, while all others run."""

import time
from collections.abc import Callable

from onebase_adapters.errors import AdapterError
from onebase_adapters.primitives.virtual_tokens import NO_LAYOUT, Layout
from onebase_engine.grammar import GrammarError
from onebase_engine.residency.resident_adapters import Residency
from onebase_engine.scheduling.sequence import Sequence

_PATIENCE_SECONDS = 1.0
"""So long the oldest one waits for a slot; then no younger one may keep a slot in use before it."""

Outcome = tuple[int, Layout] | AdapterError | GrammarError
"""The slot that is held and its virtual tokens; or why there will be none."""


class Aside:
    """Sequences from their arrival until all that they need is there."""

    def __init__(self, residency: Residency, clock: Callable[[], float] = time.monotonic) -> None:
        self._residency = residency
        self._clock = clock
        self._waiting: list[Sequence] = []
        self._oldest: Sequence | None = None
        self._oldest_since = 0.0
        """When it became that, by the clock."""

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, sequence: Sequence) -> None:
        self._waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        self._waiting.remove(sequence)

    def settle(self) -> list[tuple[Sequence, Outcome]]:
        """Let go of those that can be scheduled, or never will be."""
        impatient = self._impatient()
        outcomes = [(sequence, self._outcome(sequence, impatient)) for sequence in self._waiting]
        self._waiting = [sequence for sequence, outcome in outcomes if outcome is None]
        self._residency.drop_read({sequence.request.adapter or "" for sequence in self._waiting})
        return [(sequence, outcome) for sequence, outcome in outcomes if outcome is not None]

    def _outcome(self, sequence: Sequence, impatient: str | None) -> Outcome | None:
        """None: it waits on."""
        digest = sequence.request.adapter
        if impatient is not None and digest not in (None, impatient):
            return None
        try:
            if sequence.grammar is not None and not sequence.grammar.ready:
                return None
            return (0, NO_LAYOUT) if digest is None else self._residency.acquire(digest, sequence.request.parts)
        except (AdapterError, GrammarError) as error:
            return error

    def _impatient(self) -> str | None:
        """The adapter of the oldest one, if it has waited too long for a slot."""
        oldest = self._waiting[0] if self._waiting else None
        if oldest is not self._oldest:
            self._oldest, self._oldest_since = oldest, self._clock()
        digest = oldest.request.adapter if oldest else None
        waited = self._clock() - self._oldest_since
        return digest if digest and waited >= _PATIENCE_SECONDS and self._residency.lacks_slot(digest) else None
