"""An evaluation as a table in the terminal, and as JSON."""

import json
import math
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from onebase_adapters.atomic_files import disk_errors
from onebase_training.evaluation.evaluate_adapter import Scored
from onebase_training.evaluation.evaluation_result import Evaluation, gain
from onebase_training.evaluation.metrics import Score


def show(scored: Scored, console: Console, samples: int) -> None:
    """Print the marks, and the first answers."""
    table = Table("", "base", "adapter", "gain")
    base, adapter = scored.base, scored.adapter
    table.add_row("loss, nats a token", *(_loss(one) for one in (base, adapter)), _loss_gain(base, adapter))
    table.add_row("perplexity", *(_perplexity(one) for one in (base, adapter)), "")
    known = next((one.score for one in (adapter, base) if one and one.score), None)
    if known is not None:
        name = f"{known.metric.replace('_', ' ')} of {known.examples}"
        gained = gain(base, adapter) if base and adapter else None
        table.add_row(name, *(_score(one.score if one else None) for one in (base, adapter)), _score(gained, "+"))
    console.print(table)
    for number in range(samples):
        for name, one in (("base", base), ("adapter", adapter)):
            if one and number < len(one.samples):
                sample = one.samples[number]
                if name == "base" or base is None:
                    console.print(f"\n[bold]{number + 1}[/bold] wanted: {sample.expected!r}", highlight=False)
                console.print(f"  {name}: {sample.generated!r}", highlight=False, markup=False)


def write(scored: Scored, path: Path) -> None:
    """As JSON, every sample included. Raises StorageError."""
    named = {"base": scored.base, "adapter": scored.adapter}
    values = {name: asdict(one) for name, one in named.items() if one is not None}
    with disk_errors(str(path)):
        path.write_text(json.dumps(values, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def _loss(one: Evaluation | None) -> str:
    return f"{one.loss:.4f}" if one else "-"


def _loss_gain(base: Evaluation | None, adapter: Evaluation | None) -> str:
    return f"{base.loss - adapter.loss:+.4f}" if base and adapter else ""


def _perplexity(one: Evaluation | None) -> str:
    return f"{math.exp(min(one.loss, 50)):,.3f}" if one else "-"


def _score(score: Score | None, sign: str = "") -> str:
    return f"{score.value:{sign}.3f} ({score.low:{sign}.3f} to {score.high:{sign}.3f})" if score else "-"
