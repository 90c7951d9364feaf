"""A comparison as a table in the terminal, and as a page with plots."""

import math
from collections.abc import Callable, Sequence
from importlib.resources import files
from typing import Any

from jinja2 import Environment
from rich.console import Console
from rich.table import Table

from onebase_training.compare import Choice, Entry

Cost = Callable[[Entry], float]

_COSTS: dict[str, Cost] = {
    "trained parameters": lambda entry: entry.result.parameters,
    "file, MiB": lambda entry: entry.file_bytes / 2**20,
    "training, s": lambda entry: entry.result.seconds,
    "peak memory, MiB": lambda entry: entry.result.peak_memory / 2**20,
    "multiplications a token, M": lambda entry: (entry.products or 0) / 1e6,
    "context given up, tokens": lambda entry: entry.context,
}


def show(entries: Sequence[Entry], choice: Choice, console: Console) -> None:
    """Print the table and the recommendation."""
    table = Table(*columns(entries))
    for row in table_rows(entries):
        table.add_row(*row)
    console.print(table)
    console.print(f"[bold]{choice.method}[/bold]: {choice.reason}", highlight=False)


def render(entries: Sequence[Entry], choice: Choice, title: str) -> str:
    """The page's HTML, which needs no other file."""
    template = (files("onebase_training") / "compare.html.jinja").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template).render(
        title=title,
        choice=choice,
        columns=columns(entries),
        rows=table_rows(entries),
        quality=_quality_name(entries),
        plots=[_plot(name, cost, entries) for name, cost in _COSTS.items()],
    )


def columns(entries: Sequence[Entry]) -> list[str]:
    metric = [_quality_name(entries)] if entries[0].result.after.score else []
    return ["method", *metric, "held-out loss", *_COSTS]


def table_rows(entries: Sequence[Entry]) -> list[list[str]]:
    rows = []
    for entry in sorted(entries, key=_quality, reverse=True):
        score = entry.result.after.score
        marks = [f"{score.value:.3f} ({score.low:.3f} to {score.high:.3f})"] if score else []
        costs = [_short(cost(entry)) for cost in _COSTS.values()]
        if entry.products is None:
            costs[-2] = "a base of its own"
        rows.append([entry.method, *marks, f"{entry.result.after.loss:.4f}", *costs])
    return rows


def _plot(name: str, cost: Cost, entries: Sequence[Entry]) -> dict[str, Any]:
    """Points on a logarithmic scale where the costs span more than a factor of 30."""
    values = [cost(entry) for entry in entries]
    wide = min(values) > 0 and max(values) > 30 * min(values)
    x = [math.log(value) if wide else value for value in values]
    y = [_quality(entry) for entry in entries]
    points: list[dict[str, Any]] = [
        {"name": entry.method, "x": _scale(at, x, 25, 295), "y": _scale(up, y, 155, 25)}
        for entry, at, up in zip(entries, x, y, strict=True)
    ]
    for point in points:
        point["anchor"] = "start" if point["x"] < 110 else "end" if point["x"] > 210 else "middle"
    return {"name": name, "points": points, "low": _short(min(values)), "high": _short(max(values))}


def _scale(value: float, among: Sequence[float], start: int, end: int) -> float:
    spread = max(among) - min(among)
    share = (value - min(among)) / spread if spread else 0.5
    return round(start + share * (end - start), 1)


def _quality(entry: Entry) -> float:
    score = entry.result.after.score
    return score.value if score else -entry.result.after.loss


def _quality_name(entries: Sequence[Entry]) -> str:
    score = entries[0].result.after.score
    return score.metric.replace("_", " ") if score else "minus held-out loss"


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.3g}"
