"""The result on disk: a PEFT folder, with our notes beside the weights. It appears whole or not at all."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from onebase_adapters.format import SIDECAR_FILE
from onebase_adapters.paths import staged_directory
from onebase_training.evaluate import Evaluation

METRICS_FILE = "metrics.json"
_SAMPLES = 8


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
    marks = {"before": before.marks, "after": after.marks}
    both = {"before": before, "after": after}
    details = {
        "scores": {name: asdict(one.score) if one.score else None for name, one in both.items()},
        "samples": {name: [asdict(sample) for sample in one.samples[:_SAMPLES]] for name, one in both.items()},
        "history": list(history),
    }
    with staged_directory(output) as scratch:
        save(scratch)
        _write(scratch / SIDECAR_FILE, {**notes, "metrics": marks, "versions": versions()})
        _write(scratch / METRICS_FILE, {**marks, **details})


def versions() -> dict[str, str]:
    """Of everything that decides numbers."""
    names = ("onebase", "torch", "transformers", "peft", "bitsandbytes", "accelerate")
    return {name: version(name) for name in names}


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
