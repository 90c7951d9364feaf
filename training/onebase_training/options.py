"""Options that several of the training commands have: each with one help text."""

from pathlib import Path
from typing import Annotated

import typer

Data = Annotated[list[Path], typer.Option(help="Training examples; may be given several times.")]
MethodName = Annotated[str, typer.Option(help="See `onebase methods`.")]
Model = Annotated[str, typer.Option(help="Base model: catalog name, folder, or hub id.")]
EvalData = Annotated[Path | None, typer.Option(help="Held-out examples; default: a part of the data.")]
EvalFraction = Annotated[float, typer.Option(help="Share of the data that is held out.")]
Format = Annotated[str | None, typer.Option(help="The data's format; default: seen from its columns.")]
MaxLength = Annotated[int, typer.Option(help="Most tokens of an example.")]
BatchTokens = Annotated[
    int | None, typer.Option(help="Tokens of one forward pass; default: 8 examples' on average, 256 to 1024.")
]
MetricExamples = Annotated[int, typer.Option(help="Held-out examples to generate for the metric.")]
MaxNewTokens = Annotated[int, typer.Option(help="Most tokens of one of them.")]
Seed = Annotated[int, typer.Option(help="Of everything random.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:N, or auto.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")]
