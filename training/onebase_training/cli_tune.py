"""`onebase tune`: the command line of the search."""

from pathlib import Path
from typing import Annotated

import typer

from onebase_adapters.base.catalog import DEFAULT_BASE
from onebase_training import options


def tune(
    *,
    data: options.Data,
    output: Annotated[Path, typer.Option(help="Folder of the adapter with the best settings.")],
    method: options.MethodName = "qlora",
    trials: Annotated[int, typer.Option(min=1, help="Settings to try.")] = 12,
    model: options.Model = DEFAULT_BASE,
    eval_data: options.EvalData = None,
    eval_fraction: options.EvalFraction = 0.1,
    epochs: Annotated[float, typer.Option(help="Of each trial: passes over the data.")] = 1.0,
    max_steps: Annotated[int | None, typer.Option(help="Of each trial: optimiser steps.")] = None,
    batch_tokens: options.BatchTokens = None,
    max_length: options.MaxLength = 1024,
    head: Annotated[bool, typer.Option("--head", help="Train a classifier on labels or tags.")] = False,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    overwrite: options.Overwrite = False,
) -> None:
    """Search learning rate and size of a method, then train with the best."""
    from rich.console import Console
    from rich.table import Table

    from onebase_training import terminal
    from onebase_training.config import TrainConfig
    from onebase_training.train import train
    from onebase_training.tune import tune as search
    from onebase_training.workspace import open_workspace

    config = TrainConfig(
        data=tuple(data),
        output=output,
        method=method,
        model=model,
        eval_data=eval_data,
        eval_fraction=eval_fraction,
        epochs=epochs,
        max_steps=max_steps,
        batch_tokens=batch_tokens,
        max_length=max_length,
        head=head,
        seed=seed,
        device=device,
        overwrite=overwrite,
    )
    open_workspace(config)  # refuse before anything is tried
    console = Console()
    with terminal.watched() as progress:
        tuned = search(config, trials, train, progress)
    table = Table("trial", *tuned.tried[0].settings, "held-out loss", "")
    for number, one in enumerate(tuned.tried, 1):
        values = (f"{value:.3g}" for value in one.settings.values())
        table.add_row(str(number), *values, f"{one.loss:.4f}", "" if one.finished else "cut")
    console.print(table)
    with terminal.watched() as progress:
        result = train(tuned.best, progress)
    terminal.show(result)
