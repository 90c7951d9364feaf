"""`report.html`: a run on one page that needs no other file and no network."""

import json
import statistics
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from jinja2 import Environment

from onebase_training.evaluation.evaluation_result import gain
from onebase_training.evaluation.metrics import Score
from onebase_training.run_result import TrainResult

_SAMPLES = 8
_WIDTH, _HEIGHT, _LEFT = 800, 260, 48


def render_report(result: TrainResult, hashes: Mapping[str, str]) -> str:
    """The page's HTML. `hashes` has the digest of each file written."""
    template = (files("onebase_training.report") / "run_page.html.jinja").read_text(encoding="utf-8")
    notes = result.notes
    lengths = sorted(result.lengths)
    data = {**notes["data"], "tokens": sum(lengths)}
    data["tokens of an example"] = f"{lengths[0]} to {lengths[-1]}, median {statistics.median(lengths):g}"
    return (
        Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
        .from_string(template)
        .render(
            title=f"{notes['method']} on {notes['base']['model']}",
            parameters=f"{result.parameters:,}",
            steps=result.steps,
            seconds=f"{result.seconds:.0f}",
            speed=f"{result.tokens_per_second:.0f}",
            ended="" if result.stopped == "done" else f", ended early: {result.stopped}",
            marks=_marks(result),
            curve=_curve(result.history),
            samples=_samples(result),
            tables={
                "Data": data,
                "Base": notes["base"],
                "Settings": {
                    name: json.dumps(value, ensure_ascii=False) for name, value in notes["settings"].items()
                },
                "Versions": notes["versions"],
                "Files (SHA-256)": hashes,
            },
        )
    )


def _marks(result: TrainResult) -> list[dict[str, str]]:
    before, after = result.before, result.after
    rows = [
        {
            "name": "loss (nats per learned token)",
            "before": f"{before.loss:.4f}",
            "after": f"{after.loss:.4f}",
            "gain": f"{before.loss - after.loss:+.4f}",
        }
    ]
    gained = gain(before, after)
    if before.score and after.score and gained:
        name = f"{after.score.metric.replace('_', ' ')} of {after.score.examples} examples"
        rows.append(
            {
                "name": name,
                "before": _score(before.score),
                "after": _score(after.score),
                "gain": _score(gained, "+"),
            }
        )
    return rows


def _score(score: Score, sign: str = "") -> str:
    return f"{score.value:{sign}.3f} ({score.low:{sign}.3f} to {score.high:{sign}.3f})"


def _samples(result: TrainResult) -> list[tuple[str, str, str, str]]:
    pairs = zip(result.before.samples, result.after.samples, strict=False)
    rows = [(one.prompt, one.expected, one.generated, other.generated) for one, other in pairs]
    return rows[:_SAMPLES]


def _curve(history: Sequence[Mapping[str, float]]) -> dict[str, Any] | None:
    """Both losses by step, as SVG takes them."""
    train = [(row["step"], row["loss"]) for row in history if "loss" in row]
    held = [(row["step"], row["eval_loss"]) for row in history if "eval_loss" in row]
    if not train:
        return None
    last = max(step for step, _ in train)
    low, high = (pick(loss for _, loss in train + held) for pick in (min, max))
    spread = (high - low) or 1.0

    def points(line: Sequence[tuple[float, float]]) -> str:
        return " ".join(f"{_x(step, last):.1f},{_y((loss - low) / spread):.1f}" for step, loss in line)

    grid = [{"at": _y(part / 4), "label": f"{low + spread * part / 4:.2f}"} for part in range(5)]
    size = {"width": _WIDTH, "height": _HEIGHT, "left": _LEFT}
    return {**size, "grid": grid, "train": points(train), "held": points(held), "last": last}


def _x(step: float, last: float) -> float:
    return _LEFT + (_WIDTH - _LEFT) * step / last


def _y(share: float) -> float:
    return 10 + (_HEIGHT - 30) * (1 - share)
