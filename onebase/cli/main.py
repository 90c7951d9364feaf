"""The `onebase` command: every command by its name, and what an error of ours looks like."""

import signal
import sys
from importlib.metadata import version
from io import TextIOWrapper
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from onebase.cli import adapters, data
from onebase.cli.compare import compare
from onebase.cli.config_file import config
from onebase.cli.evaluate import evaluate
from onebase.cli.methods import methods
from onebase.cli.models import models
from onebase.cli.serve import serve
from onebase.cli.train import train
from onebase.cli.tune import tune
from onebase_adapters.errors import OneBaseError
from onebase_contract.job_order import Ending

app = typer.Typer(
    name="onebase",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "auto_envvar_prefix": "ONEBASE"},
)


def _show_version(asked: bool) -> None:
    if asked:
        print(f"onebase {version('onebase')}")
        raise typer.Exit


@app.callback()
def root(
    _version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """One frozen 4-bit base model, any number of adapters: train them, and serve them all in one batch."""


def main() -> None:
    """`onebase`."""
    for command in (compare, evaluate, methods, models, serve, train, tune):
        app.command()(command)
    app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(config)
    app.add_typer(adapters.app, name="adapters")
    app.add_typer(data.app, name="data")
    run(app, "onebase")


def run(app: typer.Typer, program: str | None = None) -> None:
    """Run a command line. An error of ours prints as one line and exits with 1, Ctrl-C or SIGTERM with 130."""
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that has no such character shows a question mark
    try:
        app(prog_name=program)
    except OneBaseError as error:
        Console(stderr=True).print(f"[red]error:[/red] {escape(error.message)}", highlight=False, soft_wrap=True)
        sys.exit(Ending.FAILED)
    except KeyboardInterrupt:
        sys.exit(Ending.STOPPED)


if __name__ == "__main__":
    main()
