"""`onebase compare`: the command line of comparisons."""

from typing import Annotated

import typer

from onebase.cli.options import takes_settings
from onebase_contract.settings import TrainConfig
from onebase_training.evaluation.evaluation_result import Evaluation
from onebase_training.run_result import TrainResult


@takes_settings(
    *("data", "output", "model", "eval_data", "eval_fraction", "epochs", "max_steps", "time_limit", "batch_tokens"),
    *("eval_every", "max_length", "metric_examples", "max_new_tokens", "head", "seed", "device", "overwrite"),
    "resume",
)
def compare(
    config: TrainConfig,
    *,
    methods: Annotated[str, typer.Option(help="With commas between; see `onebase methods`.")],
) -> None:
    """Train several methods with the same budget, and recommend one."""
    from rich.console import Console

    from onebase.cli.terminal import comparison_view
    from onebase_adapters.atomic_files import disk_errors
    from onebase_contract.events import Event, Stage
    from onebase_training.comparison import method_comparison as comparison
    from onebase_training.comparison.comparison_page import render

    names = [name.strip() for name in methods.split(",") if name.strip()]
    console = Console()

    def tell(event: Event) -> None:  # a run of its own shows the bar
        if isinstance(event, Stage):
            typer.echo(event.text, err=True)

    entries = comparison.compare(config, names, train_watched, tell)
    choice = comparison.choose(entries)
    comparison_view.show(entries, choice, console)
    page = config.output / "compare.html"
    title = f"{', '.join(entry.method for entry in entries)} on {config.model}"
    with disk_errors(str(page)):
        page.write_text(render(entries, choice, title), encoding="utf-8")
    console.print(f"Wrote {page}", highlight=False, soft_wrap=True)


def train_watched(config: TrainConfig, before: Evaluation | None) -> TrainResult:
    """`train`, shown in the terminal. At the module's top, where a new process finds it."""
    from onebase.cli.terminal.run_view import watched
    from onebase_training.training_run import train

    with watched() as progress:
        return train(config, progress, before=before)
