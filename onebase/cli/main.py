"""The `onebase` command. Its subcommands are found by the entry-point group `onebase.commands`, so that each
package brings its own and none imports another."""

import sys
from importlib.metadata import entry_points

import typer
from rich.console import Console
from rich.markup import escape

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
    """`onebase`. An entry point of the group is a command's function, or a Typer of several commands."""
    for entry in sorted(entry_points(group="onebase.commands"), key=lambda point: point.name):
        command = entry.load()
        if isinstance(command, typer.Typer):
            app.add_typer(command, name=entry.name)
        else:
            app.command(entry.name)(command)
    run(app)


def run(app: typer.Typer) -> None:
    """Run a command line. An error of ours prints as one line and exits with 1; Ctrl-C exits with 130."""
    try:
        app()
    except OneBaseError as error:
        Console(stderr=True).print(f"[red]error:[/red] {escape(error.message)}", highlight=False, soft_wrap=True)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
