"""`onebase methods`: the table of methods."""

from typing import Annotated

import typer

from onebase_engine.base.base_spec import DEFAULT_BASE


def methods(
    model: Annotated[str, typer.Option(help="The base that they would be trained on.")] = DEFAULT_BASE,
) -> None:
    """List the methods, and what each costs on a base with its default settings."""
    from rich.console import Console
    from rich.progress import track
    from rich.table import Table

    from onebase_training.comparison.method_costs import overview
    from onebase_training.methods.attach import METHODS

    console = Console()
    table = Table("method", "what it is", "trained", "file", "per token", "context", "served as", title=model)
    for name, method in track(METHODS.items(), "measuring", console=console, transient=True):
        found = overview(name, method, model)
        table.add_row(
            name,
            method.about,
            f"{found.trained:,}",
            f"{found.file_bytes / 2**20:.2f} MiB",
            f"{found.products / 1e6:.2f} M" if found.products else "-",
            str(found.context) if found.context else "its text" if method.attach is None else "-",
            found.served_as,
        )
    console.print(table)
    console.print("per token: multiplications beside the base's; context: tokens that each request gives up")
