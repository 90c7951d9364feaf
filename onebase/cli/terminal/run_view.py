"""A run in the terminal: a bar while it goes on, a table at its end."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from rich.table import Table

from onebase_contract.events import Evaluated, Event, Part, Progress, Stage, Step
from onebase_training.evaluation.evaluation_result import gain
from onebase_training.run_result import TrainResult

_EVERY = 5.0
"""Seconds after which a line says how far a stage has come, where there is no terminal."""
_PROMPT = 200
"""Characters of a prompt that are shown, its last ones."""


@contextmanager
def watched(console: Console | None = None) -> Iterator[Progress]:
    """A function that shows events on `console` while the block runs: with a bar in a terminal, else in lines."""
    console = console or Console(stderr=True)
    if console.is_terminal:
        with _bar(console) as progress:
            yield progress
    else:
        with _lines(console) as progress:
            yield progress


@contextmanager
def _bar(console: Console) -> Iterator[Progress]:
    """Keep past messages above, and below them a spinner, with how long and how far the stage has come."""
    bar = Bar(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[count]}"),
        TimeElapsedColumn(),
        console=console,
    )
    task = bar.add_task("starting", total=None, count="")

    def progress(event: Event) -> None:
        if isinstance(event, Stage):
            bar.console.print(event.text, highlight=False)
            bar.reset(task, total=None, description=_short(event.text), count="")
        elif isinstance(event, Part):
            bar.update(task, total=event.of, completed=event.done, count=f"{event.done} of {event.of} {event.unit}")
        elif isinstance(event, Evaluated):
            bar.console.print(_evaluated(event), highlight=False)
        else:
            told = f"{event.step} of {event.steps}, {_pace(event)}"
            bar.update(task, description="training", total=event.steps, completed=event.step, count=told)

    with bar:
        yield progress


@contextmanager
def _lines(console: Console) -> Iterator[Progress]:
    """Stages and evaluations as they come, and what lies between them every `_EVERY` seconds: a line that says how
    far it is, made by a thread of its own, since what takes long may say nothing."""
    lock, over = threading.Lock(), threading.Event()
    last, since = "starting", time.monotonic()

    def tell(text: str) -> None:
        nonlocal since
        since = time.monotonic()
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    def progress(event: Event) -> None:
        nonlocal last
        with lock:
            if isinstance(event, Stage):
                last = _short(event.text)
                tell(event.text)
            elif isinstance(event, Evaluated):
                tell(_evaluated(event))
            elif isinstance(event, Part):
                last = f"{last.partition(': ')[0]}: {event.done} of {event.of} {event.unit}"
            else:
                last = f"step {event.step} of {event.steps}: {_pace(event)}"

    def remind() -> None:
        while not over.wait(1):
            with lock:
                if time.monotonic() - since >= _EVERY:
                    tell(last)

    thread = threading.Thread(target=remind, daemon=True)
    thread.start()
    try:
        yield progress
    finally:
        over.set()
        thread.join()


def _short(text: str) -> str:
    return text.partition(" (")[0].partition(": ")[0][:60]


def _pace(event: Step) -> str:
    left = f"{event.seconds_left / 60:.0f} min" if event.seconds_left > 90 else f"{event.seconds_left:.0f} s"
    return f"loss {event.loss:.3f}, {event.tokens_per_second:.0f} tokens/s, {left} left"


def _evaluated(event: Evaluated) -> str:
    best = ", the best so far" if event.best else ""
    accuracy = "" if event.accuracy is None else f", accuracy {event.accuracy:.3f}"
    return f"step {event.step}: held-out loss {event.loss:.4f}{accuracy}{best}"


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
