"""The result on disk: a PEFT folder, with our notes beside the weights. It appears whole or not at all."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from onebase_adapters.files import SIDECAR_FILE
from onebase_adapters.paths import staged_directory
from onebase_training.evaluate import Evaluation

METRICS_FILE = "metrics.json"


def write_result(
    output: Path,
    save: Callable[[Path], None],
    *,
    notes: Mapping[str, Any],
    before: Evaluation,
    after: Evaluation,
    history: Sequence[Mapping[str, float]],
) -> None:
    """Write the folder. `notes` go into `onebase.json` with the metrics; `history` one row a logged step."""
    metrics = {"before": marks(before), "after": marks(after)}
    with staged_directory(output) as scratch:
        save(scratch)
        _write(scratch / SIDECAR_FILE, {**notes, "metrics": metrics, "versions": versions()})
        samples = {"before": _samples(before), "after": _samples(after)}
        _write(scratch / METRICS_FILE, {**metrics, "history": list(history), "samples": samples})


def marks(evaluation: Evaluation) -> dict[str, float]:
    """Held-out loss and metrics as one flat object."""
    return {"loss": evaluation.loss, **evaluation.metrics}


def versions() -> dict[str, str]:
    """Of everything that decides numbers."""
    names = ("onebase", "torch", "transformers", "peft", "bitsandbytes", "accelerate")
    return {name: version(name) for name in names}


def _samples(evaluation: Evaluation) -> list[dict[str, str]]:
    return [asdict(sample) for sample in evaluation.samples[:8]]


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
