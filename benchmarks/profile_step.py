"""Where the time of a decoding step goes, and the floor under it from bytes and operations.

    python -m benchmarks.profile_step [--streams 16] [--adapters 16] [--context 96] [--steps 100] [--one-thread]

Each part's time is its own, without the parts inside it (but the head's product is the head's); the median step
counts. A part's floor is what it must read at the bandwidth that this machine is measured to have, or what it must
multiply at the speed of a large bfloat16 product, whichever takes longer. Timers cost half a microsecond a call,
and for their sake layers run one kernel at a time; what they take in one call is measured apart.

On a busy machine `--one-thread` still tells something: it counts a single thread's processor time.
"""

import argparse
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numba import njit, prange, set_num_threads

from benchmarks.adapters import make_adapters
from benchmarks.offline import add_adapters, load_engine, random_prompt
from onebase_engine import engine as engine_module
from onebase_engine.base.base_spec import DEFAULT_BASE
from onebase_engine.base.describe import cache_shape
from onebase_engine.base.load_base import Linear4bit
from onebase_engine.engine import Engine
from onebase_engine.kernels.cpu import fused_decoder as fused
from onebase_engine.kernels.cpu.packed import PackedLinear
from onebase_engine.kernels.cpu.screen import Screen
from onebase_engine.request import EngineRequest, SamplingParams
from onebase_engine.runner import batched_model as served
from onebase_engine.runner.input_embedding import InputEmbedding
from onebase_engine.scheduling.scheduler import Scheduler

PARTS = ("products", "adapters", "attention", "norms", "gate", "head", "inputs", "layout", "schedule", "sample")


@dataclass
class Clock:
    """Time by part, exclusive of what runs inside."""

    now: Callable[[], float]
    spent: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    _inside: list[float] = field(default_factory=lambda: [0.0])
    _in_head: bool = False

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, with its time noted."""

        def call(*args: Any, **options: Any) -> Any:
            if self._in_head:
                return function(*args, **options)
            self._in_head = part == "head"
            self._inside.append(0.0)
            started = self.now()
            try:
                return function(*args, **options)
            finally:
                taken = self.now() - started
                self._in_head = False
                self.spent[part] += taken - self._inside.pop()
                self._inside[-1] += taken

        return call

    def install(self) -> None:
        """Put timers around the parts of a step."""
        for owner, name, part in (
            (PackedLinear, "__call__", "products"),
            (fused.cpu, "add_low_rank", "adapters"),
            (fused, "rope_attend", "attention"),
            (fused, "add_rms_norm", "norms"),
            (fused, "gate_mul", "gate"),
            (Screen, "best", "head"),
            (InputEmbedding, "__call__", "inputs"),
            (served, "make_batch", "layout"),
            (Scheduler, "plan", "schedule"),
            (engine_module, "sample", "sample"),
        ):
            setattr(owner, name, self.timed(part, getattr(owner, name)))


@njit(parallel=True, fastmath=True)  # type: ignore[untyped-decorator]
def _sum(values: np.ndarray) -> float:
    total = 0.0
    for i in prange(values.shape[0]):
        total += values[i]
    return total


def bandwidth(now: Callable[[], float]) -> float:
    """Bytes a second that all threads together read from memory."""
    values = np.ones(64 << 20, np.float32)
    _sum(values[:1000])
    return values.nbytes / min(_seconds(now, lambda: _sum(values)) for _ in range(5))


def multiply_speed(now: Callable[[], float]) -> float:
    """Operations a second of a large bfloat16 product."""
    a, b = torch.randn(2, 1024, 1024).bfloat16()
    return float(2 * 1024**3 / min(_seconds(now, lambda: a @ b) for _ in range(10)))


def _seconds(now: Callable[[], float], work: Callable[[], Any]) -> float:
    started = now()
    work()
    return now() - started


def needs(engine: Engine, streams: int, adapters: int, context: int) -> dict[str, tuple[float, float]]:
    """(bytes, operations) that a step's parts cannot do without."""
    model = engine.model.base.model
    linears = [module for module in model.modules() if isinstance(module, Linear4bit)]
    weights = sum(linear.in_features * linear.out_features for linear in linears)
    head = engine.model.shape.vocab * engine.model.shape.hidden
    shape = cache_shape(model.config)
    adapter_bytes = engine.residency.bytes / max(1, engine.residency.loaded)
    four_bit = 0.5 + 2 / 64  # a bfloat16 scale for each 64
    heads = model.config.num_attention_heads
    return {
        "products": (weights * four_bit, 2 * weights * streams),
        "adapters": (adapters * adapter_bytes, adapter_bytes * streams if adapters else 0),
        "attention": (
            streams * context * shape.token_bytes,
            4 * streams * context * heads * shape.dim * shape.layers,
        ),
        "head": (head * four_bit, 2 * head * streams),
    }


def profile(
    engine: Engine, digests: list[str], streams: int, context: int, steps: int, now: Callable[[], float]
) -> dict[str, list[float]]:
    """Seconds of each part, and of the whole, by step."""
    sampling = SamplingParams(max_tokens=steps + 8, temperature=0.0, ignore_eos=True)
    for number in range(streams):
        adapter = digests[number % len(digests)] if digests else None
        prompt = random_prompt(context - steps // 2, engine.info.vocab, number)
        engine.submit(EngineRequest(str(number), prompt, sampling, adapter))
    while any(sequence.missing > 1 for sequence in engine.scheduler.running) or engine.scheduler.idle:
        engine.step()
    found: dict[str, list[float]] = defaultdict(list)
    for _ in range(steps // 2):
        found["as it runs"].append(_seconds(now, engine.step))
    engine.model._traits.bottleneck[:] = True  # there is none: this only has the layers run one by one
    clock = Clock(now)
    clock.install()
    for _ in range(steps // 2):
        clock.spent.clear()
        whole = _seconds(now, engine.step)
        for part in PARTS:
            found[part].append(clock.spent[part])
        found["the rest"].append(whole - sum(clock.spent.values()))
        found["in parts"].append(whole)
    engine.abort_all()
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default=DEFAULT_BASE)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--adapters", type=int, default=16)
    parser.add_argument("--context", type=int, default=96, help="tokens of each sequence, on average")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--one-thread", action="store_true", help="a single thread's processor time")
    arguments = parser.parse_args()
    now = time.thread_time if arguments.one_thread else time.perf_counter
    if arguments.one_thread:
        set_num_threads(1)
    engine = load_engine(arguments.model, threads=1 if arguments.one_thread else None)
    with tempfile.TemporaryDirectory() as scratch:
        folders = make_adapters(engine.model.shape, Path(scratch), arguments.adapters)
        digests = add_adapters(engine, folders)
    read, multiply = bandwidth(now), multiply_speed(now)
    print(f"this machine reads {read / 1e9:.1f} GB/s and multiplies {multiply / 1e9:.0f} GFLOP/s")
    floors = needs(engine, arguments.streams, arguments.adapters, arguments.context)
    found = profile(engine, digests, arguments.streams, arguments.context, arguments.steps, now)
    whole = statistics.median(found["in parts"])
    runs = found.pop("as it runs")
    print(f"{'part':12} {'ms':>7} {'share':>6} {'MB':>7} {'MFLOP':>7} {'floor ms':>9}")
    total_floor = 0.0
    for part, times in found.items():
        middle = statistics.median(times)
        line = f"{part:12} {middle * 1000:7.2f} {middle / whole:6.0%}"
        if part in floors:
            size, operations = floors[part]
            floor = max(size / read, operations / multiply)
            total_floor += floor
            line += f" {size / 1e6:7.1f} {operations / 1e6:7.0f} {floor * 1000:9.2f}"
        print(line)
    taken = statistics.median(runs)
    print(f"as it runs   {taken * 1000:7.2f}  {arguments.streams / taken:.0f} tokens/s")
    print(f"floor        {total_floor * 1000:7.2f}")
    engine.close()


if __name__ == "__main__":
    main()
