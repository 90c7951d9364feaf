"""`onebase tune`: the command line of the search."""

from typing import Annotated

import typer

from onebase.cli.options import takes_settings
from onebase_contract.settings import TrainConfig


@takes_settings(
    *("data", "output", "method", "model", "eval_data", "eval_fraction", "epochs", "max_steps", "batch_tokens"),
    *("max_length", "head", "seed", "device", "overwrite"),
    epochs=1.0,
)
def tune(config: TrainConfig, *, trials: Annotated[int, typer.Option(min=1, help="Settings to try.")] = 12) -> None:
    """Search learning rate and size of a method, then train with the best."""
    from rich.console import Console
    from rich.table import Table

    from onebase.cli.terminal import run_view as terminal
    from onebase_contract.run_folder import open_workspace
    from onebase_training.comparison.hyperparameter_search import tune as search
    from onebase_training.training_run import train

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
