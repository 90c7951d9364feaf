"""A run in the terminal: a bar while it goes on, a table at its end."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TextIO

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn
from rich.progress import Progress as Bar
from rich.table import Table

from onebase_training.evaluation.evaluate import gain
from onebase_training.events import Evaluated, Event, Progress, Stage
from onebase_training.result import TrainResult

_PROMPT = 200
"""Characters of a prompt that are shown, its last ones."""


@contextmanager
def watched(console: Console | None = None) -> Iterator[Progress]:
    """A function that shows events on `console` while the block runs."""
    bar = Bar(
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TextColumn("{task.fields[speed]:.0f} tokens/s"),
        TextColumn("{task.fields[left]} left"),
        console=console or Console(stderr=True),
    )
    task: TaskID | None = None

    def progress(event: Event) -> None:
        nonlocal task
        if isinstance(event, Stage):
            bar.console.print(event.text, highlight=False)
        elif isinstance(event, Evaluated):
            best = ", the best so far" if event.best else ""
            accuracy = "" if event.accuracy is None else f", accuracy {event.accuracy:.3f}"
            text = f"step {event.step}: held-out loss {event.loss:.4f}{accuracy}{best}"
            bar.console.print(text, highlight=False)
        else:
            if task is None:
                task = bar.add_task("training", total=event.steps, loss=0.0, speed=0.0, left="")
            left = (
                f"{event.seconds_left / 60:.0f} min" if event.seconds_left > 90 else f"{event.seconds_left:.0f} s"
            )
            bar.update(task, completed=event.step, loss=event.loss, speed=event.tokens_per_second, left=left)

    with bar:
        yield progress


@contextmanager
def json_lines(stream: TextIO) -> Iterator[Progress]:
    """A function that writes each event as one line of JSON, with its kind, for another program to read."""

    def progress(event: Event) -> None:
        line = {"event": type(event).__name__.lower(), **asdict(event)}
        print(json.dumps(line, ensure_ascii=False), file=stream, flush=True)

    yield progress


def show(result: TrainResult, console: Console | None = None) -> None:
    """Before and after, and where the result is."""
    console = console or Console()
    before, after, gained = result.before, result.after, gain(result.before, result.after)
    table = Table("held out", "before", "after", "gain (95% interval)")
    table.add_row("loss", f"{before.loss:.4f}", f"{after.loss:.4f}", f"{before.loss - after.loss:+.4f}")
    if before.score and after.score and gained:
        name = f"{before.score.metric.replace('_', ' ')} of {before.score.examples}"
        interval = f"{gained.value:+.3f} ({gained.low:+.3f} to {gained.high:+.3f})"
        table.add_row(name, f"{before.score.value:.3f}", f"{after.score.value:.3f}", interval)
    console.print(table)
    ended = "" if result.stopped == "done" else f", ended early: {result.stopped}"
    console.print(
        f"{result.steps} steps in {result.seconds:.0f} s, {result.tokens_per_second:.0f} tokens/s, "
        f"{result.parameters:,} parameters{ended}.",
        highlight=False,
    )
    if after.samples and not result.notes["settings"]["head"]:
        one = after.samples[0]
        prompt = one.prompt if len(one.prompt) <= _PROMPT else "..." + one.prompt[-_PROMPT:]
        line = escape(f"For example, to the prompt {prompt!r} it answers {one.generated!r}.")
        console.print(line, highlight=False, soft_wrap=True)
    console.print(f"Wrote {result.output}", highlight=False, soft_wrap=True)
