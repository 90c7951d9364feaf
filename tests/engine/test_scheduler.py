"""The scheduler: nothing leaks, nothing is lost, nobody waits for ever, and the cache always holds what it says."""

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from onebase_engine.request import EngineRequest, SamplingParams
from onebase_engine.scheduling.scheduler import AGING_SECONDS
from onebase_engine.scheduling.sequence import Sequence, State
from support.scheduling import BLOCK, Simulation

PREFIX = list(range(1, 30))


class SchedulerMachine(RuleBasedStateMachine):
    """Random arrivals and departures over a small cache; the simulation checks each step."""

    def __init__(self) -> None:
        super().__init__()
        self.simulation = Simulation(blocks=12, budget=7, max_running=4)
        self.requests = 0

    # Prompts are beginnings of one text, so that they share prefixes, but for their last token.
    @rule(
        length=st.integers(1, 24),
        last=st.integers(1, 3),
        max_tokens=st.integers(1, 16),
        adapter=st.sampled_from([None, "a", "b"]),
        tenant=st.sampled_from(["", "t"]),
        priority=st.integers(-1, 1),
        watched=st.booleans(),
    )
    def submit(self, length: int, last: int, watched: bool, **options: object) -> None:
        self.requests += 1
        sampling = {"prompt_logprobs": 0} if watched else {}
        self.simulation.submit(f"r{self.requests}", [*PREFIX[: length - 1], last], **options, **sampling)

    @rule(steps=st.integers(1, 5))
    def step(self, steps: int) -> None:
        for _ in range(steps):
            busy = not self.simulation.scheduler.idle
            plan = self.simulation.step()
            assert bool(plan.work) == busy, "something waits and nothing runs"

    @precondition(lambda self: self.simulation.live)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.simulation.abort(data.draw(st.sampled_from(sorted(self.simulation.live))))
        self.simulation.check()

    @rule()
    def forget_prefixes(self) -> None:
        self.simulation.pool.forget()

    def teardown(self) -> None:
        self.simulation.run()
        assert not self.simulation.live
        assert self.simulation.pool.used == 0
        assert self.simulation.pool.available == self.simulation.pool.total


TestScheduler = SchedulerMachine.TestCase


def test_a_prompt_longer_than_the_budget_is_computed_in_chunks_each_token_once() -> None:
    simulation = Simulation(blocks=32, budget=5)
    simulation.submit("long", PREFIX[:23], max_tokens=6)
    simulation.submit("short", [1, 2, 9], max_tokens=6)
    simulation.run()
    for name, prompt in (("long", 23), ("short", 3)):
        generated = len(simulation.ended[name])
        counts = [simulation.computed[name, position] for position in range(prompt + generated)]
        # The last generated token is never run through the model again.
        assert counts == [1] * (prompt + generated - 1) + [0]


def test_running_decodes_are_not_held_up_by_a_long_prefill() -> None:
    simulation = Simulation(blocks=64, budget=4)
    simulation.submit("decoding", [1], max_tokens=12)
    simulation.step()
    simulation.submit("prefill", PREFIX[:27], max_tokens=1)
    for _ in range(6):
        works = {work.sequence.request.id: work for work in simulation.step().work}
        assert works["decoding"].count == 1
        assert works["prefill"].count == 3


def test_a_known_prefix_is_not_computed_again_but_its_last_token_is() -> None:
    simulation = Simulation(blocks=32)
    simulation.submit("first", PREFIX[: 3 * BLOCK], max_tokens=1)
    simulation.run()
    again = simulation.submit("again", PREFIX[: 3 * BLOCK], max_tokens=1)
    longer = simulation.submit("longer", PREFIX[: 3 * BLOCK + 2], max_tokens=1)
    simulation.run()
    assert (again.cached_tokens, longer.cached_tokens) == (2 * BLOCK, 3 * BLOCK)
    assert [simulation.computed["again", p] for p in range(3 * BLOCK)] == [0] * 2 * BLOCK + [1] * BLOCK
    assert sum(simulation.computed["longer", p] for p in range(3 * BLOCK + 2)) == 2


@pytest.mark.parametrize(
    "other",
    [{"adapter": "b"}, {"adapter": None}, {"tenant": "other"}, {"prompt_logprobs": 0}],
    ids=["another adapter", "no adapter", "another tenant", "wants prompt logprobs"],
)
def test_no_prefix_is_shared_across_owners(other: dict[str, object]) -> None:
    simulation = Simulation(blocks=32)
    simulation.submit("first", PREFIX[:16], max_tokens=1, adapter="a")
    simulation.run()
    second = simulation.submit("second", PREFIX[:16], max_tokens=1, **{"adapter": "a", **other})
    simulation.run()
    assert second.cached_tokens == 0
    assert sum(simulation.computed["second", p] for p in range(16)) == 16


def test_without_reuse_everything_is_computed() -> None:
    simulation = Simulation(blocks=32, reuse=False)
    for name in ("first", "second"):
        simulation.submit(name, PREFIX[:16], max_tokens=1)
        simulation.run()
        assert sum(simulation.computed[name, p] for p in range(16)) == 16
    assert simulation.pool.cached == 0


def test_concurrent_equal_prompts_may_share_blocks_without_harm() -> None:
    simulation = Simulation(blocks=40, budget=8)
    for number in range(6):
        simulation.submit(f"r{number}", [*PREFIX[:13], 1 + number % 2], max_tokens=8)
    simulation.run()
    assert len(simulation.ended) == 6


def test_preemption_gives_the_blocks_back_and_the_result_is_the_same() -> None:
    simulation = Simulation(blocks=6, budget=32)
    simulation.submit("first", PREFIX[:8], max_tokens=12, ignore_eos=True)
    simulation.submit("second", PREFIX[8:16], max_tokens=12, ignore_eos=True)
    simulation.run()  # compares each result with that of a run alone
    assert set(simulation.preempted) == {"second"}, "the cache is too small for both, and the oldest is no victim"
    assert set(simulation.ended) == {"first", "second"}


def test_the_victim_is_the_youngest_of_the_lowest_priority() -> None:
    simulation = Simulation(blocks=9, budget=64)
    simulation.submit("low", PREFIX[:8], max_tokens=16, priority=5, ignore_eos=True)
    simulation.submit("old", PREFIX[8:16], max_tokens=16, ignore_eos=True)
    simulation.submit("young", PREFIX[16:24], max_tokens=16, ignore_eos=True)
    while not simulation.preempted:
        simulation.step()
    assert simulation.preempted[0] == "low"


def test_a_preempted_sequence_does_not_hide_more_urgent_ones_behind_it() -> None:
    simulation = Simulation(blocks=6, budget=64)
    simulation.submit("oldest", PREFIX[:8], max_tokens=16, ignore_eos=True)
    simulation.submit("low", PREFIX[8:16], max_tokens=16, priority=5, ignore_eos=True)
    simulation.step()
    simulation.submit("urgent", PREFIX[16:28], max_tokens=8, priority=1, ignore_eos=True)
    simulation.run()
    assert simulation.preempted[0] == "low"
    assert simulation.starts[:4] == ["oldest", "low", "urgent", "low"]


def test_a_preempted_sequence_goes_before_those_that_came_after_it() -> None:
    simulation = Simulation(blocks=6, budget=64)
    simulation.submit("oldest", PREFIX[:8], max_tokens=16, ignore_eos=True)
    simulation.submit("second", PREFIX[8:16], max_tokens=16, ignore_eos=True)
    simulation.step()
    simulation.submit("third", PREFIX[16:28], max_tokens=1, ignore_eos=True)
    simulation.run()
    assert simulation.starts == ["oldest", "second", "second", "third"]


def test_a_large_request_is_not_overtaken_for_ever_by_small_ones() -> None:
    simulation = Simulation(blocks=8, budget=32, max_running=8)
    simulation.submit("small", [1, 2, 3], max_tokens=4)
    simulation.step()
    simulation.submit("large", PREFIX[:28], max_tokens=4)
    for number in range(40):
        simulation.submit(f"small{number}", [number + 1, 2, 3], max_tokens=4)
        simulation.step()
    assert "large" in simulation.admitted
    assert simulation.admitted.index("large") == 1


def test_equal_priorities_start_in_order_of_arrival() -> None:
    simulation = Simulation(blocks=64, max_running=2)
    for number in range(20):
        simulation.submit(f"r{number}", [number + 1], max_tokens=3)
    simulation.run()
    assert simulation.admitted == [f"r{number}" for number in range(20)]


def test_lower_priority_numbers_start_first() -> None:
    simulation = Simulation(blocks=64, max_running=1)
    for number, priority in enumerate([3, 1, 2, 0, 1, -5]):
        simulation.submit(f"p{priority}-{number}", [number + 1], priority=priority)
    simulation.run()
    assert simulation.admitted == ["p-5-5", "p0-3", "p1-1", "p1-4", "p2-2", "p3-0"]


@pytest.mark.parametrize("tenant", ["polite", "busy"], ids=["another tenant's", "the same tenant's"])
def test_waiting_raises_a_request_above_a_stream_of_urgent_ones(tenant: str) -> None:
    simulation = Simulation(blocks=64, max_running=1)
    simulation.submit("patient", [1, 2], max_tokens=1, tenant=tenant, priority=2)
    simulation.submit("urgent", [3], max_tokens=1, tenant="busy")
    number = 0
    while "patient" not in simulation.admitted:
        assert simulation.now < 3 * AGING_SECONDS
        number += 1
        # Two always wait, so that there is no gap to slip into.
        simulation.submit(f"urgent{number}", [3], max_tokens=1, tenant="busy")
        simulation.step()
    assert "patient" in simulation.admitted


@pytest.mark.parametrize("kind", ["tenant", "adapter"])
def test_a_long_queue_does_not_hold_up_another_ones_request(kind: str) -> None:
    simulation = Simulation(blocks=64, budget=8, max_running=4)
    for number in range(1000):
        simulation.submit(f"greedy{number}", [1 + number % 40, 7], **{kind: "greedy"})
    for _ in range(20):
        simulation.step()
    before = len(simulation.admitted)
    simulation.submit("modest", [1, 2, 3], **{kind: "modest"})
    while "modest" not in simulation.admitted:
        simulation.step()
    assert simulation.admitted.index("modest") - before <= 1


@pytest.mark.parametrize("kind", ["tenant", "adapter"])
def test_tokens_are_shared_evenly_between_long_queues(kind: str) -> None:
    simulation = Simulation(blocks=64, budget=8, max_running=4)
    for number in range(400):
        simulation.submit(f"a{number}", [1 + number % 40, 7], ignore_eos=True, **{kind: "a"})
    for number in range(100):
        # Twice as large, so half as many of them are as much work.
        simulation.submit(f"b{number}", [1 + number % 40, 7] * 2, max_tokens=8, ignore_eos=True, **{kind: "b"})
    for _ in range(150):
        simulation.step()
    tokens = {"a": 0, "b": 0}
    for (name, _), count in simulation.computed.items():
        tokens[name[0]] += count
    assert tokens["a"] > 200
    assert abs(tokens["a"] - tokens["b"]) <= 4 * 12, tokens


def test_more_adapters_do_not_get_a_tenant_a_larger_share() -> None:
    simulation = Simulation(blocks=64, budget=8, max_running=4)
    for number in range(400):
        simulation.submit(
            f"many{number}", [1 + number % 40], ignore_eos=True, tenant="m", adapter=f"a{number % 20}"
        )
        simulation.submit(f"one{number}", [1 + number % 40], ignore_eos=True, tenant="o", adapter="only")
    for _ in range(100):
        simulation.step()
    many = sum(name.startswith("many") for name in simulation.admitted)
    assert abs(2 * many - len(simulation.admitted)) <= 4


def test_idle_time_earns_no_credit() -> None:
    simulation = Simulation(blocks=64, budget=8, max_running=2)
    for number in range(600):
        simulation.submit(f"steady{number}", [1 + number % 40], tenant="steady", ignore_eos=True)
    for _ in range(200):
        simulation.step()
    before = len(simulation.admitted)
    for number in range(600):
        simulation.submit(f"late{number}", [1 + number % 40], tenant="late", ignore_eos=True)
    for _ in range(100):
        simulation.step()
    since = simulation.admitted[before:]
    late = sum(name.startswith("late") for name in since)
    assert len(since) > 20
    assert abs(2 * late - len(since)) <= 4


def test_a_thousand_adapters_leave_no_accounts_behind() -> None:
    simulation = Simulation(blocks=64, budget=64, max_running=32)
    for number in range(1000):
        simulation.submit(f"r{number}", [1], max_tokens=1, adapter=f"a{number}", tenant=f"t{number % 7}")
    simulation.run()
    assert not simulation.scheduler._shares
    assert not simulation.scheduler._tenants


def test_a_waiting_request_can_be_taken_out() -> None:
    simulation = Simulation(blocks=64, max_running=1)
    simulation.submit("running", [1], max_tokens=8)
    simulation.submit("waiting", [2], max_tokens=8)
    simulation.step()
    simulation.abort("waiting")
    simulation.run()
    assert simulation.admitted == ["running"]
    assert simulation.scheduler.waiting == 0


def test_what_can_never_fit_is_known_beforehand() -> None:
    simulation = Simulation(blocks=3)
    assert simulation.scheduler.fits(3 * BLOCK)
    assert not simulation.scheduler.fits(3 * BLOCK + 1)


@pytest.mark.parametrize(
    "way",
    [
        [State.RUNNING],
        [State.QUEUED, State.QUEUED],
        [State.QUEUED, State.RUNNING, State.RUNNING],
        [State.ENDED, State.QUEUED],
        [State.QUEUED, State.ENDED, State.ENDED],
        [State.QUEUED, State.ASIDE],
    ],
)
def test_a_sequence_leaves_its_way_with_an_error(way: list[State]) -> None:
    sequence = Sequence(EngineRequest("r", (1,), SamplingParams()), 1, frozenset())
    for state in way[:-1]:
        sequence.move(state)
    with pytest.raises(RuntimeError, match=f"Request r cannot be {way[-1].name}"):
        sequence.move(way[-1])


def test_faults_are_found() -> None:
    simulation = Simulation(blocks=12)
    for number in range(3):
        simulation.submit(f"r{number}", [1, 2, 3, 4, number], max_tokens=9)
    simulation.step()
    scheduler, running = simulation.scheduler, simulation.scheduler.running
    lost = running[0].blocks.pop()
    assert scheduler.faults()[0] == "the pages that sequences hold are not those that have references"
    running[0].blocks.append(lost)
    running[1].state = State.QUEUED
    assert scheduler.faults() == ["request r1 is not where a QUEUED one belongs"]
    running[1].state = State.RUNNING
    running[2].computed = 99
    assert scheduler.faults() == ["request r2 has more tokens computed than its blocks hold"]
    running[2].computed = 0
    simulation.pool._free.append(lost)
    assert scheduler.faults() == ["a page is in no state, or in two"]
