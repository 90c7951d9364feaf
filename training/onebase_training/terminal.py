"""A run in the terminal: a bar while it goes on, a table at its end."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn
from rich.progress import Progress as Bar
from rich.table import Table

from onebase_training.events import Evaluated, Event, Progress, Stage
from onebase_training.output import marks
from onebase_training.train import TrainResult


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
            bar.console.print(f"step {event.step}: held-out loss {event.loss:.4f}{best}", highlight=False)
        else:
            if task is None:
                task = bar.add_task("training", total=event.steps, loss=0.0, speed=0.0, left="")
            left = (
                f"{event.seconds_left / 60:.0f} min" if event.seconds_left > 90 else f"{event.seconds_left:.0f} s"
            )
            bar.update(task, completed=event.step, loss=event.loss, speed=event.tokens_per_second, left=left)

    with bar:
        yield progress


def show(result: TrainResult, console: Console | None = None) -> None:
    """Before and after, and where the result is."""
    console = console or Console()
    table = Table("held out", "before", "after")
    after = marks(result.after)
    for name, value in marks(result.before).items():
        table.add_row(name.replace("_", " "), f"{value:.4f}", f"{after[name]:.4f}")
    console.print(table)
    console.print(
        f"{result.steps} steps in {result.seconds:.0f} s, {result.tokens_per_second:.0f} tokens/s, "
        f"{result.parameters:,} parameters.",
        highlight=False,
    )
    console.print(f"Wrote {result.output}", highlight=False, soft_wrap=True)
