"""Several methods on the same data with the same budget, and which of them to take.

Each run has a process of its own, so that its peak memory is its own.
"""

import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from onebase_adapters.base import BaseSpec, load_base
from onebase_adapters.errors import AdapterError, ConfigError
from onebase_adapters.methods import load_adapter
from onebase_adapters.model.weights import ModelWeights
from onebase_training.config import TrainConfig
from onebase_training.evaluate import gain
from onebase_training.methods import find_method
from onebase_training.result import TrainResult

Run = Callable[[TrainConfig], TrainResult]


@dataclass(frozen=True)
class Entry:
    """A method's run, and what its adapter costs."""

    method: str
    result: TrainResult
    file_bytes: int
    """Of the weights."""
    products: int | None
    """Multiplications that a served token costs beside the base's. None: it is a base of its own."""
    context: int
    """Tokens of the context that each request gives up."""


@dataclass(frozen=True)
class Choice:
    """Which method to take."""

    method: str
    reason: str


def compare(config: TrainConfig, methods: Sequence[str], run: Run) -> list[Entry]:
    """Train each method into a folder of its name below `config.output`, then weigh the adapters.

    Raises what `train` raises; what is finished by then stays.
    """
    if len(set(methods)) != len(methods) or not methods:
        raise ConfigError("Name each method once.", field="methods")
    for method in methods:
        find_method(method)
    results = {}
    for method in methods:
        mine = replace(config, method=method, output=config.output / method)
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            results[method] = pool.submit(run, mine).result()
    base = load_base(BaseSpec(config.model, device=config.device))
    weights = ModelWeights(base.model)
    entries = []
    for method, result in results.items():
        files = list(result.output.glob("*.safetensors"))
        size = sum(path.stat().st_size for path in files)
        try:
            lowered = load_adapter(result.output, method, base.shape, weights)
            context = lowered.layout.tokens
            products = 0 if context else lowered.parameters
            entries.append(Entry(method, result, size, products, context))
        except AdapterError:
            entries.append(Entry(method, result, size, None, 0))
    return entries


def choose(entries: Sequence[Entry]) -> Choice:
    """Of those that the best is not better than for certain, the one with the smallest file."""
    best = max(entries, key=_quality)
    equal = [entry for entry in entries if entry is best or not _surely_better(best, entry)]
    chosen = min(equal, key=lambda entry: entry.file_bytes)
    size = f"{chosen.file_bytes / 2**20:.2f} MiB"
    if len(equal) == 1:
        reason = f"It is the best beyond chance, with a file of {size}."
    elif chosen is best:
        reason = f"It is the best, and of all within chance its file is the smallest: {size}."
    else:
        other = f"{best.file_bytes / 2**20:.2f} MiB"
        reason = f"{best.method} is the best, but not beyond chance; of all within it this file is the smallest: "
        reason += f"{size}, against {other}."
    return Choice(chosen.method, reason)


def _quality(entry: Entry) -> tuple[float, float]:
    after = entry.result.after
    return (after.score.value if after.score else 0.0, -after.loss)


def _surely_better(one: Entry, other: Entry) -> bool:
    """By the paired interval of the metric; without a metric, by the loss alone."""
    difference = gain(other.result.after, one.result.after)
    if difference is None:
        return one.result.after.loss < other.result.after.loss
    return difference.low > 0


def train_watched(config: TrainConfig) -> TrainResult:
    """`train`, shown in the terminal. At the module's top, where a new process finds it."""
    from onebase_training.terminal import watched
    from onebase_training.train import train

    with watched() as progress:
        return train(config, progress)


def output_of(config: TrainConfig) -> Path:
    """Checked: the folder of the comparison must be new."""
    output = config.output.expanduser().resolve()
    if output.exists() and any(output.iterdir()) and not config.overwrite:
        raise ConfigError(f"{output} exists. Choose another output, or --overwrite it.", field="output")
    return output
