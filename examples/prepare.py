"""`python -m examples.prepare NAME`: a recipe's data as train.jsonl and eval.jsonl."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from examples.recipes import RECIPES, Recipe, Row
from onebase.cli.main import run
from onebase_adapters.atomic_files import staged_directory
from onebase_adapters.errors import ConfigError
from onebase_engine.base.package_files import Progress, cached_file
from onebase_training.data import Dataset, split
from onebase_training.data.reading.formats import FORMATS, recognise
from onebase_training.data.reading.text_files import Record


def prepare(
    name: str,
    folder: Path,
    *,
    limit: int | None = None,
    eval_limit: int | None = None,
    seed: int = 0,
    progress: Progress = print,
) -> Path:
    """Write a recipe's train.jsonl and eval.jsonl into `folder`, which is replaced if it exists; returns it.

    Both are shuffled by `seed` and keep at most `limit` and `eval_limit` rows. Raises ConfigError (no such recipe),
    DownloadError or StorageError.
    """
    if name not in RECIPES:
        raise ConfigError(f"No recipe {name!r}; there are {', '.join(RECIPES)}.", field="name")
    recipe = RECIPES[name]
    rows = list(recipe.rows([cached_file(file, progress=progress) for file in recipe.files]))
    parts = split_rows(recipe, rows, seed)
    with staged_directory(folder) as staged:
        for part, chosen, most in zip(("train", "eval"), parts, (limit, eval_limit), strict=True):
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in chosen[:most])
            (staged / f"{part}.jsonl").write_text(text, encoding="utf-8")
            progress(f"{folder / f'{part}.jsonl'}: {len(chosen[:most])} of {len(chosen)} rows")
    return folder


def split_rows(recipe: Recipe, rows: Sequence[Row], seed: int) -> tuple[list[Row], list[Row]]:
    """The rows for training and those held out, shuffled."""
    records = [Record("rows", number, row) for number, row in enumerate(rows, 1)]
    layout = recognise(records[0])
    examples = tuple(FORMATS[layout].convert(record) for record in records)
    by_row = recipe.group
    group = None if by_row is None else lambda example: by_row(rows[example.line - 1])
    parts = split(Dataset(examples, layout, "rows", ""), eval_fraction=recipe.held_out, seed=seed, group=group)
    train, held_out = ([rows[example.line - 1] for example in part.examples] for part in parts)
    for part in (train, held_out):
        random.Random(seed).shuffle(part)
    return train, held_out


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    name: Annotated[str, typer.Argument(help="The recipe; without one, all are listed.")] = "",
    out: Annotated[Path | None, typer.Option(help="The folder to write; out/NAME by default.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many rows for training.")] = None,
    eval_limit: Annotated[int | None, typer.Option(min=1, help="At most so many rows held out.")] = None,
    seed: Annotated[int, typer.Option(help="Of the split and the order.")] = 0,
) -> None:
    """Fetch a real data set, and write its train.jsonl and eval.jsonl."""
    if name:
        prepare(name, out or Path("out") / name, limit=limit, eval_limit=eval_limit, seed=seed)
        return
    console = Console(highlight=False, soft_wrap=True)
    for key, recipe in RECIPES.items():
        console.print(f"[bold]{key}[/bold]  {recipe.about}; measured by {recipe.metric}")
        console.print(f"  [dim]{recipe.files[0].requirement}, {recipe.files[0].license}[/dim]")


if __name__ == "__main__":
    run(app)
