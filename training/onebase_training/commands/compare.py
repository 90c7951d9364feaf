"""`onebase compare`: the command line of comparisons."""

from typing import Annotated

import typer

from onebase_training.commands.options import takes_settings
from onebase_training.config import TrainConfig


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

    from onebase_adapters.paths import disk_errors
    from onebase_training.comparison import compare as comparison
    from onebase_training.comparison import show as compare_show
    from onebase_training.events import Event, Stage

    names = [name.strip() for name in methods.split(",") if name.strip()]
    console = Console()

    def tell(event: Event) -> None:  # a run of its own shows the bar
        if isinstance(event, Stage):
            typer.echo(event.text, err=True)

    entries = comparison.compare(config, names, comparison.train_watched, tell)
    choice = comparison.choose(entries)
    compare_show.show(entries, choice, console)
    page = config.output / "compare.html"
    title = f"{', '.join(entry.method for entry in entries)} on {config.model}"
    with disk_errors(str(page)):
        page.write_text(compare_show.render(entries, choice, title), encoding="utf-8")
    console.print(f"Wrote {page}", highlight=False, soft_wrap=True)
