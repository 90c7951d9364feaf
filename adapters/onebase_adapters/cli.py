"""The `onebase` command. Its subcommands are found by the entry-point group `onebase.commands`, so that each
package brings its own and none imports another."""

import sys
from importlib.metadata import entry_points

import typer
from rich.console import Console

from onebase_adapters.errors import OneBaseError

app = typer.Typer(
    name="onebase",
    help="One frozen 4-bit base model, any number of adapters: train them, and serve them all in one batch.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


@app.callback()
def root() -> None:
    """Keeps `onebase COMMAND` a group even while only one command is installed."""


def main() -> None:
    """Run the command line. An error of ours prints as one line and exits with 1; Ctrl-C exits with 130."""
    for command in sorted(entry_points(group="onebase.commands"), key=lambda point: point.name):
        app.command(command.name)(command.load())
    try:
        app()
    except OneBaseError as error:
        Console(stderr=True).print(f"[red]error:[/red] {error.message}", highlight=False, soft_wrap=True)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
