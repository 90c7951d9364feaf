"""A scheduler driven by a model that is a pure function of the tokens, and that keeps its own page memory.

The memory holds, for each cached position, a digest of everything that the position depends on. Each step reads
back all positions below the ones it computes: a page that was shared wrongly, given away too early, or never
computed shows up as a digest that is not the expected one.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence as Items

from onebase_engine.cache.block_pool import BlockPool
from onebase_engine.request import EngineRequest, SamplingParams
from onebase_engine.scheduling.scheduler import Plan, Scheduler, Work
from onebase_engine.scheduling.sequence import Sequence

BLOCK = 4
VOCAB = 50
EOS = 0


def digests(tokens: Items[int], owner: str) -> list[bytes]:
    """What the model's state at each position depends on: the adapter, and all tokens up to there."""
    state = owner.encode()
    found = []
    for token in tokens:
        state = hashlib.blake2b(b"%d" % token, key=state[:64], digest_size=8).digest()
        found.append(state)
    return found


def next_token(tokens: Items[int], owner: str) -> int:
    """The fake model's choice after `tokens`; rarely the end token."""
    return int.from_bytes(digests(tokens, owner)[-1], "little") % VOCAB


def expected_output(request: EngineRequest) -> list[int]:
    """What the fake model generates for a request that has it to itself."""
    tokens = list(request.prompt)
    while len(tokens) < len(request.prompt) + request.sampling.max_tokens:
        token = next_token(tokens, request.adapter or "")
        if token == EOS and not request.sampling.ignore_eos:
            break
        tokens.append(token)
    return tokens[len(request.prompt) :]


class Simulation:
    """Scheduler, pool and fake model; checks what must hold after every step."""

    def __init__(self, *, blocks: int, budget: int = 16, max_running: int = 8, reuse: bool = True) -> None:
        self.pool = BlockPool(blocks, BLOCK, reuse=reuse)
        self.now = 0.0
        """The scheduler's clock, which each step moves on by a hundredth of a second."""
        self.scheduler = Scheduler(
            self.pool, max_batch_tokens=budget, max_running=max_running, clock=lambda: self.now
        )
        self.memory: dict[tuple[int, int], bytes] = {}
        self.live: dict[str, Sequence] = {}
        self.ended: dict[str, list[int]] = {}
        self.admitted: list[str] = []
        """Ids in the order in which they first ran."""
        self.starts: list[str] = []
        """The same, with those that start again after a preemption."""
        self.computed: Counter[tuple[str, int]] = Counter()
        """How often each position of each sequence was computed."""
        self.preempted: list[str] = []
        self._arrivals = 0

    def submit(
        self,
        name: str,
        prompt: Items[int],
        max_tokens: int = 4,
        *,
        adapter: str | None = None,
        tenant: str = "",
        priority: int = 0,
        **sampling: int,
    ) -> Sequence:
        request = EngineRequest(
            name, tuple(prompt), SamplingParams(max_tokens=max_tokens, **sampling), adapter, tenant, priority
        )
        self._arrivals += 1
        sequence = Sequence(request, self._arrivals, frozenset({EOS}))
        self.live[name] = sequence
        self.scheduler.add(sequence)
        return sequence

    def abort(self, name: str) -> None:
        self.scheduler.remove(self.live.pop(name))

    def step(self) -> Plan:
        before = set(self.scheduler.running)
        self.now += 0.01
        plan = self.scheduler.plan()
        self.starts += [s.request.id for s in self.scheduler.running if s not in before]
        assert plan.tokens <= self.scheduler.max_batch_tokens
        assert len(self.scheduler.running) <= self.scheduler.max_running
        assert len({work.sequence for work in plan.work}) == len(plan.work), "a sequence is in the step twice"
        self.preempted += [sequence.request.id for sequence in plan.preempted]
        for sequence in plan.preempted:
            assert not sequence.blocks
            assert sequence.computed == 0
        # As in a real step: all of it is written before any of it is read.
        for work in plan.work:
            self._write(work)
        chosen = [self._read(work) for work in plan.work]
        for work in plan.work:
            self.scheduler.advance(work)
        for work, token in zip(plan.work, chosen, strict=True):
            if work.samples and work.sequence.append(token) is not None:
                self._end(work.sequence)
        self.check()
        return plan

    def run(self, limit: int = 10_000) -> int:
        """Step until nothing is left; the number of steps."""
        for steps in range(limit):
            if self.scheduler.idle:
                return steps
            assert self.step().work, "nothing was planned although something waits"
        raise AssertionError(f"not done after {limit} steps")

    def check(self) -> None:
        assert not self.scheduler.faults()
        assert {*self.scheduler.sequences()} == {*self.live.values()}
        owners: dict[int, bytes] = {}
        for sequence in self.live.values():
            for block in sequence.blocks:
                assert owners.setdefault(block, sequence.salt) == sequence.salt, "shared by two owners"

    def _write(self, work: Work) -> None:
        sequence = work.sequence
        name = sequence.request.id
        assert work.count >= 1
        assert work.start == sequence.computed
        if name not in self.admitted:
            self.admitted.append(name)
        expected = digests(sequence.tokens, sequence.request.adapter or "")
        for position in range(work.start, work.start + work.count):
            self.memory[sequence.blocks[position // BLOCK], position % BLOCK] = expected[position]
            self.computed[name, position] += 1

    def _read(self, work: Work) -> int:
        sequence = work.sequence
        end = work.start + work.count
        stored = [self.memory.get((sequence.blocks[p // BLOCK], p % BLOCK)) for p in range(end)]
        assert stored == digests(sequence.tokens[:end], sequence.request.adapter or ""), "the cache is wrong"
        return next_token(sequence.tokens[:end], sequence.request.adapter or "")

    def _end(self, sequence: Sequence) -> None:
        name = sequence.request.id
        assert name not in self.ended, "ended twice"
        self.ended[name] = sequence.tokens[sequence.prompt_tokens :]
        assert self.ended[name] == expected_output(sequence.request)
        self.scheduler.remove(self.live.pop(name))
