"""`onebase evaluate`: the command line."""

import enum
from pathlib import Path
from typing import Annotated

import typer

from onebase_adapters.base.catalog import DEFAULT_BASE
from onebase_training import options


class Quantization(enum.StrEnum):
    """How the base's linear layers are held."""

    NF4 = "nf4"
    FP4 = "fp4"
    NONE = "none"


def evaluate(
    adapter: Annotated[Path | None, typer.Argument(help="The adapter's folder; none: the base.")] = None,
    *,
    data: Annotated[Path, typer.Option(help="Examples, in any format that training reads.")],
    model: options.Model = DEFAULT_BASE,
    quantization: Annotated[Quantization, typer.Option(help="Of the base, as it is served.")] = Quantization.NF4,
    format: options.Format = None,
    max_length: Annotated[int, typer.Option(min=2, help="Most tokens of an example.")] = 1024,
    metric_examples: Annotated[int, typer.Option(min=0, help="Examples to generate for the metric.")] = 200,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of one of them.")] = 128,
    device: options.Device = "auto",
    samples: Annotated[int, typer.Option(min=0, help="Answers to show.")] = 3,
    output: Annotated[Path | None, typer.Option(help="Write all of it as JSON to this file.")] = None,
) -> None:
    """Score an adapter and its base on data, by the code that serves them."""
    from rich.console import Console

    from onebase_adapters.base import BaseSpec
    from onebase_training.evaluate_served import EvaluateConfig, evaluate_served
    from onebase_training.evaluate_show import show, write
    from onebase_training.terminal import watched

    base = BaseSpec(model, quantization.value, device=device)
    config = EvaluateConfig(data, base, adapter, format, max_length, metric_examples, max_new_tokens)
    with watched() as progress:
        scored = evaluate_served(config, progress)
    if output is not None:
        write(scored, output)
    show(scored, Console(), samples)
