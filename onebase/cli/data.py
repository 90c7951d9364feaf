"""`onebase data`: looking at data without training. What is heavy is imported once it is needed."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from onebase.cli.options import Model
from onebase_engine.base.base_spec import DEFAULT_BASE

app = typer.Typer(help="Look at training data.", no_args_is_help=True)


@app.callback()
def root() -> None:
    """Look at training data."""


@app.command("check")
def check_files(
    files: Annotated[list[Path], typer.Argument(help="Data files; of several, each is a task.")],
    eval_data: Annotated[Path | None, typer.Option(help="Held-out data, to look for leakage.")] = None,
    model: Model = DEFAULT_BASE,
    max_length: Annotated[int, typer.Option(min=2, help="Most tokens of an example.")] = 1024,
    format: Annotated[str | None, typer.Option(help="The format; default: seen from the columns.")] = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave out records that cannot be used.")] = False,
    samples: Annotated[int, typer.Option(min=0, help="Examples to show token by token.")] = 3,
) -> None:
    """Show what a data file holds and what is wrong with it. An error of the data exits with 1."""
    from onebase.cli.terminal.data_view import show
    from onebase_engine.base.catalog import fetch_base
    from onebase_training.data import read_dataset, read_datasets
    from onebase_training.data.data_check import check
    from onebase_training.data.encoding.encode import encode_whole

    console = Console()
    data = read_datasets(files, format=format, skip_bad=skip_bad)
    held_out = None if eval_data is None else read_dataset(eval_data, format=format, skip_bad=skip_bad)
    folder = fetch_base(model, progress=console.print)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    sequences = encode_whole(data.examples, tokenizer)
    show(check(data, sequences, max_length=max_length, held_out=held_out, samples=samples), tokenizer, console)
