"""What runs in the next step. There is no prefill phase and no decode phase, only tokens not yet computed:
running sequences get theirs first, then waiting ones are admitted while the token budget and the cache last.

Admission takes the blocks for a sequence's whole length at once, so a started prefill can never be stuck for
memory; only the growth by new tokens can, and then the youngest sequence of the lowest priority gives its
blocks back and is computed again later. The oldest of the highest priority is never the victim, so it always
advances, and with it everything ends.
"""

import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import chain

from onebase_engine.cache.block_pool import BlockPool
from onebase_engine.cache.prefix_hash import block_hashes
from onebase_engine.scheduling.sequence import Sequence, State

AGING_SECONDS = 5.0
"""Waiting that raises a request by one priority, so that a stream of urgent ones starves nobody."""


@dataclass(frozen=True)
class Work:
    """A run of one sequence's tokens to compute in this step."""

    sequence: Sequence
    start: int
    count: int

    @property
    def samples(self) -> bool:
        """Whether it reaches the sequence's end, so that its next token is chosen."""
        return self.start + self.count == len(self.sequence.tokens)


@dataclass(frozen=True)
class Plan:
    """One step's work. Empty when there is nothing to do."""

    work: tuple[Work, ...]
    preempted: tuple[Sequence, ...] = ()

    @property
    def tokens(self) -> int:
        return sum(work.count for work in self.work)


@dataclass
class _Share:
    """A tenant's or an adapter's account: waiting sequences, and tokens served so far."""

    served: float = 0.0
    waiting: deque[Sequence] = field(default_factory=deque)


def _turn(sequence: Sequence) -> tuple[float, int]:
    """Order within a share. Waiting raises all alike, so that two never change places."""
    return sequence.request.priority * AGING_SECONDS + (sequence.entered or 0.0), sequence.arrival


class Scheduler:
    """Decides; holds no tensors. One call of `plan`, one step, one call of `advance` for each Work."""

    def __init__(
        self,
        pool: BlockPool,
        *,
        max_batch_tokens: int,
        max_running: int,
        whole_prompts: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`max_batch_tokens`: the step's token budget; `max_running`: most sequences in a step; `whole_prompts`:
        never compute a prompt in parts, for models whose tokens see those after them; `clock`: seconds."""
        self.pool = pool
        self.max_batch_tokens = max_batch_tokens
        self.max_running = max_running
        self.whole_prompts = whole_prompts
        self.running: list[Sequence] = []
        self.preemptions = 0
        self._clock = clock
        self._shares: dict[tuple[str, str], _Share] = {}
        self._tenants: dict[str, float] = {}
        self._waiting: set[Sequence] = set()

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def idle(self) -> bool:
        return not self.running and not self._waiting

    def fits(self, tokens: int) -> bool:
        """Whether a sequence of so many tokens could run with the whole cache to itself."""
        return self.pool.blocks_for(tokens) <= self.pool.total

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence."""
        self._enqueue(sequence)

    def plan(self) -> Plan:
        """Choose the next step's work and take the blocks that it needs."""
        budget = self.max_batch_tokens
        work: list[Work] = []
        preempted: list[Sequence] = []
        # Decodes first: one token each, and they are what somebody is watching.
        for sequence in sorted(self.running, key=lambda s: (s.missing > 1, s.request.priority, s.arrival)):
            if budget == 0:
                break
            if sequence in preempted:
                continue  # for an earlier one in this very loop
            if self.whole_prompts and sequence.missing > budget:
                continue
            if not self._grow(sequence, preempted, work):
                continue
            work.append(self._work(sequence, budget))
            budget -= work[-1].count
        while budget and not preempted and len(self.running) < self.max_running:
            admitted = self._admit(budget)
            if admitted is None:
                break
            work.append(self._work(admitted, budget))
            budget -= work[-1].count
        return Plan(tuple(work), tuple(preempted))

    def advance(self, work: Work) -> None:
        """Note that a Work has been computed: its full blocks can be reused from now on."""
        sequence = work.sequence
        before = sequence.computed // self.pool.block_size
        sequence.computed += work.count
        after = sequence.computed // self.pool.block_size
        if after > before:
            self._hash(sequence)
            for index in range(before, after):
                self.pool.publish(sequence.blocks[index], sequence.hashes[index])

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, running or waiting, and give its blocks back."""
        if sequence.state is State.QUEUED:
            self._dequeue(sequence)
        else:
            self.running.remove(sequence)
        sequence.move(State.ENDED)
        self._release(sequence)
        self._forget_idle_share(self._key(sequence))

    def sequences(self) -> Iterable[Sequence]:
        """All of them, running and waiting."""
        return [*self.running, *self._waiting]

    def faults(self) -> list[str]:
        """Contradictions between sequences, queues and the pool; none, if all is well."""
        found = self.pool.faults(chain.from_iterable(sequence.blocks for sequence in self.running))
        queued = {sequence for share in self._shares.values() for sequence in share.waiting}
        for sequence in {*self.running, *self._waiting, *queued}:
            runs, waits = sequence in self.running, sequence in self._waiting and sequence in queued
            if (runs, waits) != (sequence.state is State.RUNNING, sequence.state is State.QUEUED):
                found.append(f"request {sequence.request.id} is not where a {sequence.state.name} one belongs")
            if sequence.state is State.RUNNING and len(sequence.blocks) * self.pool.block_size < sequence.computed:
                found.append(f"request {sequence.request.id} has more tokens computed than its blocks hold")
        return found

    def _work(self, sequence: Sequence, budget: int) -> Work:
        """As much of a sequence as the budget allows, charged to its accounts at once: the next to be admitted
        in the same step is then chosen with this one counted."""
        work = Work(sequence, sequence.computed, min(sequence.missing, budget))
        key = self._key(sequence)
        self._shares[key].served += work.count
        self._tenants[key[0]] += work.count
        return work

    def _grow(self, sequence: Sequence, preempted: list[Sequence], work: list[Work]) -> bool:
        """Get the blocks for all tokens of a running sequence; False if it was preempted itself."""
        need = self.pool.blocks_for(len(sequence.tokens)) - len(sequence.blocks)
        if need <= 0:
            return True
        planned = {item.sequence for item in work} if self.pool.available < need else set()
        while self.pool.available < need:
            victim = max(
                (s for s in self.running if s not in planned), key=lambda s: (s.request.priority, s.arrival)
            )
            self._preempt(victim)
            preempted.append(victim)
            if victim is sequence:
                return False
        sequence.blocks += self.pool.allocate(need)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.preemptions += 1
        self.running.remove(sequence)
        self._release(sequence)
        self._enqueue(sequence)

    def _release(self, sequence: Sequence) -> None:
        self.pool.release(sequence.blocks)
        sequence.blocks = []
        sequence.computed = 0

    def _admit(self, budget: int) -> Sequence | None:
        """Start the sequence whose turn it is, if the cache has room for it."""
        sequence = self._next()
        if sequence is None or (self.whole_prompts and len(sequence.tokens) > budget):
            return None
        self._hash(sequence)
        prefix = self.pool.find_prefix(sequence.hashes[: sequence.reusable // self.pool.block_size])
        need = self.pool.blocks_for(len(sequence.tokens)) - len(prefix)
        if need > self.pool.available - self.pool.idle(prefix):
            return None
        self.pool.take(prefix)
        sequence.blocks = prefix + self.pool.allocate(need)
        sequence.computed = len(prefix) * self.pool.block_size
        if not sequence.started:
            sequence.started = True
            sequence.waited = time.perf_counter() - sequence.arrived
            sequence.cached_tokens = bisect_left(sequence.own, sequence.computed)
        self._dequeue(sequence)
        sequence.move(State.RUNNING)
        self.running.append(sequence)
        return sequence

    def _hash(self, sequence: Sequence) -> None:
        sequence.hashes = block_hashes(sequence.tokens, sequence.salt, self.pool.block_size, sequence.hashes)

    def _next(self) -> Sequence | None:
        """The waiting sequence whose turn it is: by priority (raised by waiting), then the tenant that was
        served least, then its adapter that was served least, then age."""
        best: tuple[tuple[float, ...], Sequence] | None = None
        now = self._clock()
        for key, share in self._shares.items():
            if not share.waiting:
                continue
            sequence = share.waiting[0]
            raised = (now - (sequence.entered or 0.0)) // AGING_SECONDS
            rank = (sequence.request.priority - raised, self._tenants[key[0]], share.served, sequence.arrival)
            if best is None or rank < best[0]:
                best = (rank, sequence)
        return best[1] if best else None

    def _key(self, sequence: Sequence) -> tuple[str, str]:
        return sequence.request.tenant, sequence.request.adapter or ""

    def _enqueue(self, sequence: Sequence) -> None:
        key = self._key(sequence)
        if key not in self._shares:
            # A newcomer starts level with the least served: idle time earns no credit.
            self._tenants.setdefault(key[0], min(self._tenants.values(), default=0.0))
            others = [share.served for (tenant, _), share in self._shares.items() if tenant == key[0]]
            self._shares[key] = _Share(served=min(others, default=0.0))
        if sequence.entered is None:
            sequence.entered = self._clock()
        sequence.move(State.QUEUED)
        self._waiting.add(sequence)
        # Almost always this appends; a preempted one goes back before those that came after it.
        queue = self._shares[key].waiting
        place = len(queue)
        while place and _turn(queue[place - 1]) > _turn(sequence):
            place -= 1
        queue.insert(place, sequence)

    def _dequeue(self, sequence: Sequence) -> None:
        self._shares[self._key(sequence)].waiting.remove(sequence)
        self._waiting.remove(sequence)

    def _forget_idle_share(self, key: tuple[str, str]) -> None:
        """Drop accounts that nobody uses any more, so that ten thousand adapters leave no trace."""
        share = self._shares.get(key)
        if share is None or share.waiting or any(self._key(s) == key for s in self.running):
            return
        del self._shares[key]
        if not any(tenant == key[0] for tenant, _ in self._shares):
            del self._tenants[key[0]]
