"""The result on disk: a PEFT folder, with our notes beside the weights.

It is written in two steps into a folder that appears whole or not at all, because what is written is measured, too.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from onebase_adapters.formats.peft_folder import SIDECAR_FILE
from onebase_training.report.model_card import render_card
from onebase_training.report.run_page import render_report
from onebase_training.run_result import TrainResult

METRICS_FILE = "metrics.json"
REPORT_FILE = "report.html"
CARD_FILE = "README.md"
_SAMPLES = 8


def write_adapter(folder: Path, save: Callable[[Path], None], notes: Mapping[str, Any]) -> None:
    """Write what can be served: the adapter's or the model's files, by `save`, and `onebase.json`."""
    save(folder)
    _write(folder / SIDECAR_FILE, notes)


def write_marks(folder: Path, result: TrainResult, hub_id: str) -> None:
    """Write what became known of it since: metrics in `onebase.json`, `metrics.json`, `report.html` and a model
    card that names the base by `hub_id`."""
    both = {"before": result.before, "after": result.after}
    marks = {name: one.marks for name, one in both.items()}
    details = {
        "scores": {name: asdict(one.score) if one.score else None for name, one in both.items()},
        "samples": {name: [asdict(sample) for sample in one.samples[:_SAMPLES]] for name, one in both.items()},
        "history": list(result.history),
    }
    written = [path for path in sorted(folder.iterdir()) if path.is_file() and path.name != SIDECAR_FILE]
    hashes = {path.name: _sha256(path) for path in written}
    _write(folder / SIDECAR_FILE, {**result.notes, "metrics": marks})
    _write(folder / METRICS_FILE, {**marks, **details})
    (folder / REPORT_FILE).write_text(render_report(result, hashes), encoding="utf-8")
    (folder / CARD_FILE).write_text(render_card(result, hub_id), encoding="utf-8")


def versions() -> dict[str, str]:
    """The versions of everything that decides numbers."""
    names = ("onebase", "torch", "transformers", "peft", "bitsandbytes", "accelerate")
    return {name: version(name) for name in names}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
