"""Several methods on the same data with the same budget, and which of them to take.

Each run has a process of its own, so that its peak memory is its own. What is known of a finished one is written at
once: an interrupted comparison goes on where it was, and another method can join it later.
"""

import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace

from onebase_adapters.errors import ConfigError
from onebase_contract.events import Progress, Stage, silent
from onebase_contract.run_folder import Workspace
from onebase_contract.settings import TrainConfig
from onebase_engine.base.base_spec import BaseSpec
from onebase_training.comparison.comparison_folder import Entry, open_comparison, write_comparison
from onebase_training.data import Example
from onebase_training.evaluation.evaluation_result import Evaluation, gain
from onebase_training.evaluation.serving_cost import STREAMS, serving_cost
from onebase_training.methods.attach import find_method
from onebase_training.run_plan import read_data
from onebase_training.run_result import TrainResult

Run = Callable[[TrainConfig, Evaluation | None], TrainResult]
"""Trains; the base's own marks are given where they are known."""


@dataclass(frozen=True)
class Choice:
    """Which method to take."""

    method: str
    reason: str


def compare(config: TrainConfig, methods: Sequence[str], run: Run, progress: Progress = silent) -> list[Entry]:
    """Train each method into a folder of its name below `config.output`, and weigh what comes out.

    With `config.resume`, what is finished there is taken, and an unfinished run goes on. Raises what `train`
    raises; what is finished by then stays.
    """
    if len(set(methods)) != len(methods) or not methods:
        raise ConfigError("Name each method once.", field="methods")
    for method in methods:
        find_method(method)
    dataset, held_out = read_data(config)
    described = {"settings": config.settings(), "data": {"train": dataset.digest, "held_out": held_out.digest}}
    output = config.output.expanduser().resolve()
    entries = {entry.method: entry for entry in open_comparison(output, described, config)}
    some = held_out.examples[:STREAMS]
    for number, method in enumerate(methods, 1):
        if method in entries:
            progress(Stage(f"{method} ({number} of {len(methods)}): finished before"))
            continue
        progress(Stage(f"{method} ({number} of {len(methods)})"))
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            known = known_before(method, list(entries.values()), config)
            entries[method] = pool.submit(_weigh, run, _one(config, method), known, some).result()
        write_comparison(output, described, list(entries.values()))
    return list(entries.values())


def _one(config: TrainConfig, method: str) -> TrainConfig:
    """The method's own run, which goes on if it was interrupted. A folder that is there was not weighed."""
    mine = replace(config, method=method, output=config.output / method)
    unfinished = config.resume and Workspace.of(mine).folder.exists()
    return replace(mine, resume=unfinished, overwrite=not unfinished)


def known_before(method: str, entries: Sequence[Entry], config: TrainConfig) -> Evaluation | None:
    """The base's marks by an earlier run that had the very same base."""
    wanted = _base_of(method, config)
    return next((entry.before for entry in entries if _base_of(entry.method, config) == wanted), None)


def _base_of(method: str, config: TrainConfig) -> tuple[str, bool]:
    found = find_method(method)
    return found.quantization, config.head or found.head


def _weigh(run: Run, config: TrainConfig, before: Evaluation | None, examples: Sequence[Example]) -> Entry:
    """In the process of the run, and after it: its peak memory is measured by then."""
    result = run(config, before)
    size = sum(path.stat().st_size for path in result.output.glob("*.safetensors"))
    whole = config.method == "full"
    cost = None if whole else serving_cost(result.output, BaseSpec(config.model, device=config.device), examples)
    return Entry(
        method=config.method,
        before=result.before,
        after=result.after,
        steps=result.steps,
        stopped=result.stopped,
        parameters=result.parameters,
        seconds=result.seconds,
        peak_memory=result.peak_memory,
        file_bytes=size,
        cost=cost,
    )


def choose(entries: Sequence[Entry]) -> Choice:
    """The smallest file among those that the best does not clearly beat."""
    served = [entry for entry in entries if entry.cost is None or not entry.cost.refused]
    if not served:
        return Choice(entries[0].method, "It is not served: none of these is.")
    best = max(served, key=_quality)
    equal = [entry for entry in served if entry is best or not _surely_better(best, entry)]
    chosen = min(equal, key=lambda entry: entry.file_bytes)
    size = f"{chosen.file_bytes / 2**20:.2f} MiB"
    if len(served) == 1:
        reason = f"There is no other to choose; its file is {size}."
    elif len(equal) == 1:
        reason = f"It is the best beyond chance, with a file of {size}."
    elif chosen is best:
        reason = f"It is the best, and of all within chance its file is the smallest: {size}."
    else:
        other = f"{best.file_bytes / 2**20:.2f} MiB"
        reason = f"{best.method} is the best, but not beyond chance; of all within it this file is the smallest: "
        reason += f"{size}, against {other}."
    return Choice(chosen.method, f"{reason} {_beside_base(chosen)}")


def _beside_base(entry: Entry) -> str:
    gained = gain(entry.before, entry.after)
    if gained is None:
        return f"Its loss is {entry.before.loss - entry.after.loss:+.4f} below the base's."
    interval = f"{gained.value:+.3f} ({gained.low:+.3f} to {gained.high:+.3f}) beside the base"
    if gained.low > 0:
        return f"It gains {interval}."
    return f"But it is not better than the base beyond chance, {interval}: train longer, or on more examples."


def _quality(entry: Entry) -> tuple[float, float]:
    score = entry.after.score
    return (score.value if score else 0.0, -entry.after.loss)


def _surely_better(one: Entry, other: Entry) -> bool:
    """By the paired interval of the metric; without a metric, by the loss alone."""
    difference = gain(other.after, one.after)
    if difference is None:
        return one.after.loss < other.after.loss
    return difference.low > 0
