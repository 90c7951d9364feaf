"""The engine alone, without HTTP: prefill, and generation by streams and adapters.

    python -m benchmarks.offline [--model M] [--streams 1,16,64] [--prompt-tokens 64] [--output-tokens 64]

Each number of streams is run with no adapter, with one for all, and with a different one for each, in turns; the
median round counts. Tokens per second are output tokens over the whole time, prefill included.
"""

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.adapters import make_adapters
from onebase_engine.base.base_spec import DEFAULT_BASE, BaseSpec
from onebase_engine.engine import Engine
from onebase_engine.engine_config import EngineConfig
from onebase_engine.request import EngineRequest, SamplingParams
from onebase_engine.startup import start_engine


def load_engine(model: str, **options: object) -> Engine:
    """An engine that finds no prefix again, so that every round does the same work."""
    config = EngineConfig(base=BaseSpec(model), reuse_prefixes=False, **options)  # type: ignore[arg-type]
    return start_engine(config, progress=print)


def add_adapters(engine: Engine, folders: Sequence[Path]) -> list[str]:
    """Make them resident; returns their digests."""
    for folder in folders:
        engine.load_adapter(folder.name, folder).result()
    return [folder.name for folder in folders]


def random_prompt(length: int, vocab: int, seed: int) -> tuple[int, ...]:
    """Token ids without the specials at the vocabulary's beginning."""
    draw = random.Random(seed)
    return tuple(draw.randrange(min(100, vocab // 2), vocab) for _ in range(length))


def generate(engine: Engine, adapters: Sequence[str | None], prompt_tokens: int, output_tokens: int) -> float:
    """Seconds for one request for each of `adapters`, all at once."""
    sampling = SamplingParams(max_tokens=output_tokens, temperature=0.0, ignore_eos=True)
    started = time.perf_counter()
    for number, adapter in enumerate(adapters):
        prompt = random_prompt(prompt_tokens, engine.info.vocab, number)
        if engine.submit(EngineRequest(str(number), prompt, sampling, adapter)) is not None:
            raise RuntimeError("the engine refused a request of the benchmark")
    made = 0
    while engine.busy:
        made += sum(len(output.tokens) for output in engine.step())
    if made != len(adapters) * output_tokens:
        raise RuntimeError(f"{made} tokens were generated, not {len(adapters) * output_tokens}")
    return time.perf_counter() - started


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default=DEFAULT_BASE)
    parser.add_argument("--streams", default="1,16,64")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    streams = [int(part) for part in arguments.streams.split(",")]
    engine = load_engine(arguments.model)
    with tempfile.TemporaryDirectory() as scratch:
        folders = make_adapters(engine.model.shape, Path(scratch), max(streams), arguments.rank)
        digests = add_adapters(engine, folders)
    sizes = (arguments.prompt_tokens, arguments.output_tokens)
    generate(engine, [None, digests[0]], *sizes)
    prefills = [generate(engine, [None], 512, 1) for _ in range(arguments.rounds)]
    print(f"prefill of 512 tokens: {statistics.median(prefills) * 1000:.0f} ms")
    for count in streams:
        kinds: dict[str, list[str | None]] = {
            "no adapter": [None] * count,
            "one adapter": [digests[0]] * count,
            f"{count} adapters": list(digests[:count]),
        }
        seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
        for _ in range(arguments.rounds):
            for kind, adapters in kinds.items():
                seconds[kind].append(generate(engine, adapters, *sizes))
        for kind, taken in seconds.items():
            speed = count * arguments.output_tokens / statistics.median(taken)
            taxes = [1 - plain / other for plain, other in zip(seconds["no adapter"], taken, strict=True)]
            tax = "" if kind == "no adapter" else f"  (tax {statistics.median(taxes):.0%})"
            print(f"{count:3} streams, {kind:12} {speed:7.0f} tokens/s{tax}")
    engine.close()


if __name__ == "__main__":
    main()
