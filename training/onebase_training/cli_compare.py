"""`onebase compare`: the command line of comparisons."""

from pathlib import Path
from typing import Annotated

import typer

from onebase_adapters.base.catalog import DEFAULT_BASE
from onebase_training import options


def compare(
    *,
    data: options.Data,
    output: Annotated[Path, typer.Option(help="Folder that gets one folder a method, and compare.html.")],
    methods: Annotated[str, typer.Option(help="With commas between; see `onebase methods`.")],
    model: options.Model = DEFAULT_BASE,
    eval_data: options.EvalData = None,
    eval_fraction: options.EvalFraction = 0.1,
    epochs: Annotated[float, typer.Option(help="Budget of each: passes over the data.")] = 3.0,
    max_steps: Annotated[int | None, typer.Option(help="Budget of each: optimiser steps.")] = None,
    time_limit: Annotated[float | None, typer.Option(help="Budget of each: seconds of training.")] = None,
    batch_tokens: options.BatchTokens = None,
    eval_every: Annotated[int | None, typer.Option(help="Steps between evaluations; default: 8 in a run.")] = None,
    max_length: options.MaxLength = 1024,
    metric_examples: options.MetricExamples = 64,
    max_new_tokens: options.MaxNewTokens = 128,
    head: Annotated[bool, typer.Option("--head", help="Train classifiers on labels or tags.")] = False,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    overwrite: options.Overwrite = False,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on with an interrupted comparison, or add methods to a finished one."),
    ] = False,
) -> None:
    """Train several methods with the same budget, and recommend one."""
    from rich.console import Console

    from onebase_adapters.paths import disk_errors
    from onebase_training import compare as comparison
    from onebase_training import compare_show
    from onebase_training.config import TrainConfig
    from onebase_training.events import Event, Stage

    config = TrainConfig(
        data=tuple(data),
        output=output,
        model=model,
        eval_data=eval_data,
        eval_fraction=eval_fraction,
        epochs=epochs,
        max_steps=max_steps,
        time_limit=time_limit,
        batch_tokens=batch_tokens,
        eval_every=eval_every,
        max_length=max_length,
        metric_examples=metric_examples,
        max_new_tokens=max_new_tokens,
        head=head,
        seed=seed,
        device=device,
        overwrite=overwrite,
        resume=resume,
    )
    names = [name.strip() for name in methods.split(",") if name.strip()]
    console = Console()

    def tell(event: Event) -> None:  # a run of its own shows the bar
        if isinstance(event, Stage):
            typer.echo(event.text, err=True)

    entries = comparison.compare(config, names, comparison.train_watched, tell)
    choice = comparison.choose(entries)
    compare_show.show(entries, choice, console)
    page = config.output / "compare.html"
    title = f"{', '.join(entry.method for entry in entries)} on {model}"
    with disk_errors(str(page)):
        page.write_text(compare_show.render(entries, choice, title), encoding="utf-8")
    console.print(f"Wrote {page}", highlight=False, soft_wrap=True)
