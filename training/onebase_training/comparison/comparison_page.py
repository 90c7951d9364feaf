"""A comparison as a table in the terminal, and as a page with plots."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from importlib.resources import files
from typing import Any

from jinja2 import Environment

from onebase_training.comparison.comparison_folder import Entry
from onebase_training.comparison.method_comparison import Choice
from onebase_training.evaluation.evaluation_result import gain
from onebase_training.evaluation.metrics import Score

Cost = Callable[[Entry], float | None]

_COSTS: dict[str, Cost] = {
    "trained parameters": lambda entry: entry.parameters,
    "file, MiB": lambda entry: entry.file_bytes / 2**20,
    "training, s": lambda entry: entry.seconds,
    "peak memory, MiB": lambda entry: entry.peak_memory / 2**20,
    "time of a served token, of the base's": lambda entry: entry.cost.times if entry.cost else None,
    "context given up, tokens": lambda entry: entry.cost.context if entry.cost else None,
}


def render(entries: Sequence[Entry], choice: Choice, title: str) -> str:
    """The page's HTML, which needs no other file."""
    template = (files("onebase_training.comparison") / "comparison_page.html.jinja").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template).render(
        title=title,
        choice=choice,
        columns=columns(entries),
        rows=table_rows(entries),
        remarks=remarks(entries),
        quality=_quality_name(entries),
        plots=[_plot(name, cost, entries) for name, cost in _COSTS.items()],
    )


def columns(entries: Sequence[Entry]) -> list[str]:
    metric = [_quality_name(entries), "beside the base"] if entries[0].after.score else []
    return ["method", *metric, "held-out loss", *_COSTS]


def table_rows(entries: Sequence[Entry]) -> list[list[str]]:
    rows = []
    for entry in sorted(entries, key=_quality, reverse=True):
        score, gained = entry.after.score, gain(entry.before, entry.after)
        marks = [_interval(score), _interval(gained, "+") if gained else "-"] if score else []
        costs = ["-" if (value := cost(entry)) is None else _short(value) for cost in _COSTS.values()]
        if entry.cost is None:
            costs[-2] = "a base of its own"
        elif entry.cost.refused:
            costs[-2] = "not served"
        rows.append([entry.method, *marks, f"{entry.after.loss:.4f}", *costs])
    return rows


def remarks(entries: Sequence[Entry]) -> list[str]:
    """Say what the marks are to be held against, which methods ended early, and why some are not served."""
    lines = []
    score = entries[0].after.score
    if score is not None and score.metric == "accuracy":
        wanted = Counter(" ".join(sample.expected.split()) for sample in entries[0].after.samples)
        answer, times = wanted.most_common(1)[0]
        lines.append(f"Always {answer!r} would have an accuracy of {times / wanted.total():.3f}.")
    for entry in entries:
        if entry.stopped != "done":
            lines.append(f"{entry.method} ended early, after {entry.steps} steps: {entry.stopped}.")
        if entry.cost and entry.cost.refused:
            lines.append(f"{entry.method} is not served: {entry.cost.refused}")
    return lines


def _plot(name: str, cost: Cost, entries: Sequence[Entry]) -> dict[str, Any]:
    """Points on a logarithmic scale where the costs span more than a factor of 30."""
    known = [(entry, value) for entry in entries if (value := cost(entry)) is not None]
    values = [value for _, value in known] or [0.0]
    wide = min(values) > 0 and max(values) > 30 * min(values)
    x = [math.log(value) if wide else value for value in values]
    y = [_quality(entry) for entry, _ in known]
    points: list[dict[str, Any]] = [
        {"name": entry.method, "x": _scale(at, x, 25, 295), "y": _scale(up, y, 155, 25)}
        for (entry, _), at, up in zip(known, x, y, strict=False)
    ]
    for point in points:
        point["anchor"] = "start" if point["x"] < 110 else "end" if point["x"] > 210 else "middle"
    return {"name": name, "points": points, "low": _short(min(values)), "high": _short(max(values))}


def _scale(value: float, among: Sequence[float], start: int, end: int) -> float:
    spread = max(among) - min(among)
    share = (value - min(among)) / spread if spread else 0.5
    return round(start + share * (end - start), 1)


def _quality(entry: Entry) -> float:
    return entry.after.score.value if entry.after.score else -entry.after.loss


def _quality_name(entries: Sequence[Entry]) -> str:
    score = entries[0].after.score
    return score.metric.replace("_", " ") if score else "minus held-out loss"


def _interval(score: Score, sign: str = "") -> str:
    return f"{score.value:{sign}.3f} ({score.low:{sign}.3f} to {score.high:{sign}.3f})"


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.3g}"
