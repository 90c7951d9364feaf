"""OneBase over HTTP beside what one would do without it, in one run on one machine: `make bench`.

    python -m benchmarks.compare [--quick] [--rounds 3] [--model M] [--json FILE]

The peers are transformers' generate() and PEFT's mixed-adapter batch (`adapter_names`) on the very same NF4 base.
All take turns in every round, so that a busy machine is busy for all; ratios are taken within a round, their median
counts. Prompts and outputs have 64 tokens, adapters rank 8 on every linear site. `--quick` is two rounds, with the
slow peers' time for 64 tokens extrapolated from 12.
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import uvloop

from benchmarks.adapters import make_adapters
from benchmarks.load import Load, Report, percentile, run_load
from benchmarks.offline import generate, load_engine, random_prompt
from benchmarks.peers import generate_seconds, load_peer, prefill_seconds, with_adapters
from benchmarks.server import Server, serve
from onebase_engine.base.base_spec import DEFAULT_BASE, BaseSpec
from onebase_engine.engine import Engine

PROMPT = OUTPUT = 64
PREFILL = 512


@dataclass(frozen=True)
class Bar:
    """A figure that is asked for."""

    name: str
    wanted: float
    at_least: bool
    measured: float
    unit: str = "x"

    @property
    def reached(self) -> bool:
        return self.measured >= self.wanted if self.at_least else self.measured <= self.wanted

    def line(self) -> str:
        """For people."""
        sign = ">=" if self.at_least else "<="
        verdict = "reached" if self.reached else "MISSED"
        return f"{self.name:58} {self.measured:8.2f} {self.unit:3} {sign} {self.wanted:<5g} {verdict}"


@dataclass
class Rounds:
    """Seconds, or tokens a second, of each contestant by round."""

    values: dict[str, list[float]] = field(default_factory=dict)

    def add(self, name: str, value: float) -> None:
        self.values.setdefault(name, []).append(value)

    def median(self, name: str) -> float:
        return statistics.median(self.values[name])

    def ratio(self, name: str, other: str) -> float:
        """Median over the rounds of name / other."""
        pairs = zip(self.values[name], self.values[other], strict=True)
        return statistics.median(one / two for one, two in pairs)


class Contest:
    """Everything that takes part, loaded."""

    def __init__(self, server: Server, names: Sequence[str], engine: Engine, base: str, peers: "Peers") -> None:
        self.server = server
        self.names = names
        self.engine = engine
        self.base = base
        self.peers = peers
        self.rounds = Rounds()
        self.reports: dict[str, Report] = {}
        self._served = 0

    def served(
        self, label: str, models: Sequence[str], streams: int, prompt: int = PROMPT, output: int = OUTPUT
    ) -> None:
        """One request for each stream, over HTTP."""
        load = Load(
            models, streams, streams, prompt_tokens=(prompt, prompt), output_tokens=(output, output),
            vocab=self.engine.info.vocab, seed=self._served,
        )  # fmt: skip
        self._served += 1  # never the same prompts again: none are found in the prefix cache
        report = uvloop.run(run_load(self.server.url, load))
        if report.failures or report.tokens != streams * output:
            raise RuntimeError(f"{label}: {report.failures or report.tokens}")
        self.rounds.add(label, report.speed)
        self.reports[label] = report

    def offline(self, label: str, streams: int) -> None:
        """The same by the engine alone, in this process."""
        self.rounds.add(label, streams * OUTPUT / generate(self.engine, [None] * streams, PROMPT, OUTPUT))

    def peer(self, label: str, tokens: int, seconds: Callable[[], float]) -> None:
        """A peer's turn."""
        self.rounds.add(label, tokens / seconds())

    def warm_up(self) -> None:
        """Each a little."""
        self.served("warm", self.names, len(self.names), output=2)
        generate(self.engine, [None] * 32, PROMPT, 2)
        self.peers.warm_up()
        self.rounds = Rounds()

    def play(self) -> None:
        """One round. Those that are compared stand next to each other."""
        none, names = [self.base], self.names
        self.served("16 streams, 16 adapters", names[:16], 16)
        self.peer("PEFT mixed batch, 16 adapters", 16 * OUTPUT, self.peers.mixed)
        self.served("16 streams, no adapter", none, 16)
        self.served("16 streams, 16 adapters again", names[:16], 16)
        self.served("64 streams, no adapter", none, 64)
        self.served("64 streams, 64 adapters", names[:64], 64)
        self.served("1 stream, no adapter", none, 1)
        self.peer("generate(), 1 stream", OUTPUT, self.peers.alone)
        self.served("prefill of 512", none, 1, PREFILL, 1)
        self.peer("transformers' prefill of 512", 1, self.peers.prefill)
        self.served("32 streams over HTTP", none, 32)
        self.offline("32 streams, engine alone", 32)

    def bars(self) -> list[Bar]:
        """What the rounds say."""
        rounds = self.rounds
        return [
            Bar("16 streams with 16 adapters / PEFT mixed batch", 10, True,
                rounds.ratio("16 streams, 16 adapters", "PEFT mixed batch, 16 adapters")),
            Bar("tax of 16 different adapters over 16 streams", 15, False,
                100 * (1 - rounds.ratio("16 streams, 16 adapters again", "16 streams, no adapter")), "%"),
            Bar("tax of 64 different adapters over 64 streams", 25, False,
                100 * (1 - rounds.ratio("64 streams, 64 adapters", "64 streams, no adapter")), "%"),
            Bar("one stream / generate()", 5, True,
                rounds.ratio("1 stream, no adapter", "generate(), 1 stream")),
            Bar("prefill of 512 tokens / transformers", 1.5, True,
                rounds.ratio("prefill of 512", "transformers' prefill of 512")),
            Bar("32 streams over HTTP / engine alone", 95, True,
                100 * rounds.ratio("32 streams over HTTP", "32 streams, engine alone"), "%"),
            Bar("start to ready", 10, False, self.server.seconds_to_ready, "s"),
            self._memory(),
        ]  # fmt: skip

    def _memory(self) -> Bar:
        """Once all adapters are resident and 64 streams have run."""
        info, stats = self.engine.info, self.server.stats()
        used = info.cache_bytes * (stats["blocks_used"] + stats["blocks_cached"]) / stats["blocks_total"]
        reserved = info.cache_bytes
        memory = self.server.memory()
        parts = {
            "weights": info.weight_bytes, "adapters": stats["adapter_bytes"], "cache": reserved,
            "of that used": used, "the server's processes": memory.resident, "without files": memory.anonymous,
        }  # fmt: skip
        print("memory: " + ", ".join(f"{name} {size / 2**20:.0f} MiB" for name, size in parts.items()))
        # Pages of the cache that nobody has used yet are not there yet, so they are added on both sides.
        needed = info.weight_bytes + reserved + stats["adapter_bytes"]
        return Bar("memory / weights + cache + adapters", 1.3, False, (memory.resident + reserved - used) / needed)


class Peers:
    """What one would use without a server."""

    def __init__(self, spec: BaseSpec, folders: Sequence[Path], sampled: int) -> None:
        """`sampled`: output tokens that are really made; time for OUTPUT is extrapolated from them."""
        self.plain = load_peer(spec)
        self._peft = with_adapters(load_peer(spec), folders)
        self._names = [folder.name for folder in folders]
        self._sampled = sampled

    def warm_up(self) -> None:
        """One token each; the weights are packed at their first use."""
        generate_seconds(self.plain.model, self._prompts(1, PROMPT), 1)
        generate_seconds(self._peft, self._prompts(len(self._names), 8), 1, adapter_names=self._names)

    def _prompts(self, count: int, length: int) -> torch.Tensor:
        vocab = self.plain.shape.vocab
        return torch.tensor([random_prompt(length, vocab, seed) for seed in range(count)])

    def mixed(self) -> float:
        """Seconds of PEFT's mixed batch."""
        return self._extrapolated(self._peft, len(self._names), adapter_names=self._names)

    def alone(self) -> float:
        """Seconds of one stream of generate()."""
        return self._extrapolated(self.plain.model, 1)

    def prefill(self) -> float:
        """Seconds of one forward pass."""
        return prefill_seconds(self.plain.model, self._prompts(1, PREFILL))

    def _extrapolated(self, model: Any, count: int, **options: Any) -> float:
        prompts = self._prompts(count, PROMPT)
        if self._sampled >= OUTPUT:
            return generate_seconds(model, prompts, OUTPUT, **options)
        first = generate_seconds(model, prompts, 1, **options)
        some = generate_seconds(model, prompts, self._sampled, **options)
        return first + (some - first) / (self._sampled - 1) * (OUTPUT - 1)


def run(model: str, rounds: int, sampled: int) -> tuple[list[Bar], dict[str, float]]:
    """Set up, play, and show everything; the bars, and each contestant's median."""
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        print("loading the engine (which compiles its kernels if need be), the peers, the server", flush=True)
        engine = load_engine(model)
        folders = make_adapters(engine.model.shape, root, 64)
        peers = Peers(BaseSpec(model), folders[:16], sampled)
        with serve(model, root, "--served-name", "base") as server:
            contest = Contest(server, server.register(folders), engine, "base", peers)
            contest.warm_up()
            for number in range(rounds):
                started = time.perf_counter()
                contest.play()
                print(f"round {number + 1} of {rounds}: {time.perf_counter() - started:.0f} s", flush=True)
            _show(contest)
            bars = contest.bars()
        engine.close()
    print("\n".join(bar.line() for bar in bars))
    return bars, {name: contest.rounds.median(name) for name in contest.rounds.values}


def _show(contest: Contest) -> None:
    print(f"\n{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
    for name in contest.rounds.values:
        value = contest.rounds.median(name)
        if "prefill" in name:
            print(f"{name:34} {1000 / value:8.0f} ms")
        else:
            print(f"{name:34} {value:8.1f} tokens/s", end="")
            report = contest.reports.get(name)
            if report and report.gaps:
                times = [percentile(v, p) * 1000 for v in (report.first, report.gaps) for p in (50, 99)]
                print("   first token p50/p99 {:.0f}/{:.0f} ms, between {:.1f}/{:.1f} ms".format(*times), end="")
            print()
    print()


def main() -> None:
    """Print every bar; exit with 1 if one is missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two rounds, the slow peers extrapolated")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--model", default=DEFAULT_BASE)
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    arguments = parser.parse_args()
    rounds = arguments.rounds or (2 if arguments.quick else 5)
    bars, medians = run(arguments.model, rounds, 12 if arguments.quick else OUTPUT)
    if arguments.json:
        figures = {"bars": [asdict(bar) for bar in bars], "medians": medians}
        arguments.json.write_text(json.dumps(figures, indent=1))
    raise SystemExit(not all(bar.reached for bar in bars))


if __name__ == "__main__":
    main()
