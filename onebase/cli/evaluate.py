"""`onebase evaluate`: the command line."""

from pathlib import Path
from typing import Annotated

import typer

from onebase.cli.options import Model
from onebase_engine.base.base_spec import DEFAULT_BASE, BaseSpec, Quantization


def evaluate(
    adapter: Annotated[Path | None, typer.Argument(help="The adapter's folder; none: the base.")] = None,
    *,
    data: Annotated[Path, typer.Option(help="Examples, in any format that training reads.")],
    model: Model = DEFAULT_BASE,
    quantization: Annotated[Quantization, typer.Option(help="Of the base, as it is served.")] = "nf4",
    format: Annotated[str | None, typer.Option(help="The data's; default: seen from its columns.")] = None,
    max_length: Annotated[int, typer.Option(min=2, help="Most tokens of an example.")] = 1024,
    metric_examples: Annotated[int, typer.Option(min=0, help="Examples to generate for the metric.")] = 200,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of one of them.")] = 128,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:N, or auto.")] = "auto",
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave out records that cannot be used.")] = False,
    samples: Annotated[int, typer.Option(min=0, help="Answers to show.")] = 3,
    output: Annotated[Path | None, typer.Option(help="Write all of it as JSON to this file.")] = None,
) -> None:
    """Score an adapter and its base on data, by the code that serves them."""
    from rich.console import Console

    from onebase.cli.terminal.evaluation_view import show, write
    from onebase.cli.terminal.run_view import watched
    from onebase_training.evaluation.evaluate_adapter import EvaluateConfig, evaluate_served

    base = BaseSpec(model, quantization, device=device)
    config = EvaluateConfig(data, base, adapter, format, max_length, metric_examples, max_new_tokens, skip_bad)
    with watched() as progress:
        scored = evaluate_served(config, progress)
    if output is not None:
        write(scored, output)
    show(scored, Console(), samples)
