"""A comparison's results for each finished method, as `compare.json` in its folder, rewritten whole after each."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from onebase_adapters.atomic_files import disk_errors
from onebase_adapters.errors import ConfigError
from onebase_contract.settings import TrainConfig
from onebase_training.evaluation.evaluation_result import Evaluation, Sample
from onebase_training.evaluation.metrics import Score
from onebase_training.evaluation.serving_cost import ServingCost
from onebase_training.fitting.early_stopping import Stopped

COMPARISON_FILE = "compare.json"


@dataclass(frozen=True)
class Entry:
    """A method's run, and what its adapter costs."""

    method: str
    before: Evaluation
    """The base's marks; with a head, those of an untrained one on it."""
    after: Evaluation
    steps: int
    stopped: Stopped
    parameters: int
    """Trained ones."""
    seconds: float
    """Time spent in training steps, evaluations left out."""
    peak_memory: int
    """Bytes, as in TrainResult."""
    file_bytes: int
    """The size of the weights."""
    cost: ServingCost | None
    """None: it is a base of its own."""


def open_comparison(output: Path, described: Mapping[str, Any], config: TrainConfig) -> list[Entry]:
    """Return the entries that are finished in `output`, which is a comparison like `described` from then on.

    Raises ConfigError where it may not be written, or `config.resume` finds no comparison or another one.
    """
    file = output / COMPARISON_FILE
    if config.resume:
        if not file.is_file():
            raise ConfigError(f"There is no comparison in {output}; start it without --resume.", field="resume")
        stored = json.loads(file.read_text(encoding="utf-8"))
        _check_same(stored["described"], json.loads(json.dumps(described)))
        return [_entry(values) for values in stored["entries"]]
    if output.exists() and any(output.iterdir()) and not config.overwrite:
        raise ConfigError(
            f"{output} exists. Go on with --resume, choose another output, or --overwrite it.", field="output"
        )
    write_comparison(output, described, [])
    return []


def write_comparison(output: Path, described: Mapping[str, Any], entries: Sequence[Entry]) -> None:
    """Raises StorageError."""
    text = json.dumps({"described": described, "entries": [asdict(entry) for entry in entries]}, ensure_ascii=False)
    with disk_errors(str(output)):
        output.mkdir(parents=True, exist_ok=True)
        partial = output / f".{COMPARISON_FILE}.partial"
        partial.write_text(text + "\n", encoding="utf-8")
        partial.replace(output / COMPARISON_FILE)


def _check_same(stored: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """But for the method, which is each entry's own."""
    for part in ("settings", "data"):
        for field, value in stored[part].items():
            if field != "method" and now[part].get(field) != value:
                raise ConfigError(
                    f"The comparison has {field} = {value!r}, this one {now[part].get(field)!r}. Resume with the "
                    "same data and settings, or start again with --overwrite.",
                    field=field,
                )


def _entry(values: dict[str, Any]) -> Entry:
    cost = values["cost"]
    return Entry(
        **values
        | {"before": _evaluation(values["before"]), "after": _evaluation(values["after"])}
        | {"cost": ServingCost(**cost) if cost else None}
    )


def _evaluation(values: dict[str, Any]) -> Evaluation:
    score = values["score"]
    samples = [Sample(**sample) for sample in values["samples"]]
    return Evaluation(values["loss"], Score(**score) if score else None, samples)
