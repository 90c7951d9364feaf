"""`onebase train`: the command line, resolved to one TrainConfig. What is heavy is imported once it is needed."""

import enum
from pathlib import Path
from typing import Annotated

import typer

from onebase_adapters.base.catalog import DEFAULT_BASE


class Schedule(enum.StrEnum):
    """How the learning rate falls."""

    COSINE = "cosine"
    LINEAR = "linear"
    CONSTANT = "constant"


class TooLong(enum.StrEnum):
    """What happens to an example of too many tokens."""

    ERROR = "error"
    SKIP = "skip"
    CUT = "cut"


class Choice(enum.StrEnum):
    """Decided by memory, or not."""

    AUTO = "auto"
    ALWAYS = "always"
    NEVER = "never"


def train(
    *,
    data: Annotated[Path, typer.Option(help="Training examples.")],
    output: Annotated[Path, typer.Option(help="Folder of the result.")],
    method: Annotated[str, typer.Option(help="What is trained: lora, qlora.")] = "qlora",
    model: Annotated[str, typer.Option(help="Base model: catalog name, folder, or hub id.")] = DEFAULT_BASE,
    eval_data: Annotated[Path | None, typer.Option(help="Held-out examples; default: a part of the data.")] = None,
    eval_fraction: Annotated[float, typer.Option(help="Share of the data that is held out.")] = 0.1,
    format: Annotated[str | None, typer.Option(help="The data's format; default: seen from its columns.")] = None,
    max_length: Annotated[int, typer.Option(help="Most tokens of an example.")] = 1024,
    too_long: Annotated[TooLong, typer.Option(help="What happens to a longer one.")] = TooLong.ERROR,
    rank: Annotated[int, typer.Option(help="Of low-rank updates.")] = 16,
    alpha: Annotated[float | None, typer.Option(help="Scale of low-rank updates, times rank.")] = None,
    dropout: Annotated[float, typer.Option(help="On the input of low-rank updates.")] = 0.0,
    targets: Annotated[
        str, typer.Option(help="Modules to update, e.g. q_proj,v_proj; default: all linear ones.")
    ] = "",
    epochs: Annotated[float, typer.Option(help="Passes over the data.")] = 3.0,
    max_steps: Annotated[int | None, typer.Option(help="Most optimiser steps.")] = None,
    time_limit: Annotated[float | None, typer.Option(help="Most seconds of training.")] = None,
    batch_tokens: Annotated[int, typer.Option(help="Tokens of one forward pass.")] = 1024,
    accumulate: Annotated[int, typer.Option(help="Forward passes in a step.")] = 1,
    learning_rate: Annotated[float | None, typer.Option(help="Peak; default: the method's.")] = None,
    schedule: Annotated[Schedule, typer.Option(help="From the peak downwards.")] = Schedule.COSINE,
    warmup: Annotated[float, typer.Option(help="Share of steps of rising learning rate.")] = 0.05,
    weight_decay: Annotated[float, typer.Option(help="AdamW's.")] = 0.0,
    clip: Annotated[float, typer.Option(help="Largest norm of the gradient; 0: any.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    eval_every: Annotated[int | None, typer.Option(help="Steps between evaluations; default: 8 in a run.")] = None,
    patience: Annotated[int, typer.Option(help="Evaluations without gain before it stops; 0: never.")] = 3,
    metric_examples: Annotated[int, typer.Option(help="Held-out examples to generate for the metric.")] = 64,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens of one of them.")] = 128,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:N, or auto.")] = "auto",
    dequantize: Annotated[
        Choice, typer.Option(help="Hold frozen 4-bit weights as bfloat16: the same values, faster.")
    ] = Choice.AUTO,
    checkpointing: Annotated[
        Choice, typer.Option(help="Recompute activations: less memory, slower.")
    ] = Choice.AUTO,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an unfinished run.")] = False,
) -> None:
    """Train an adapter from a data file."""
    from onebase_training.config import TrainConfig

    config = TrainConfig(
        data=data,
        output=output,
        method=method,
        model=model,
        eval_data=eval_data,
        eval_fraction=eval_fraction,
        format=format,
        max_length=max_length,
        too_long=too_long.value,
        rank=rank,
        alpha=alpha,
        dropout=dropout,
        targets=tuple(name.strip() for name in targets.split(",") if name.strip()),
        epochs=epochs,
        max_steps=max_steps,
        time_limit=time_limit,
        batch_tokens=batch_tokens,
        accumulate=accumulate,
        learning_rate=learning_rate,
        schedule=schedule.value,
        warmup=warmup,
        weight_decay=weight_decay,
        clip=clip,
        seed=seed,
        eval_every=eval_every,
        patience=patience,
        metric_examples=metric_examples,
        max_new_tokens=max_new_tokens,
        device=device,
        dequantize=dequantize.value,
        checkpointing=checkpointing.value,
        overwrite=overwrite,
        resume=resume,
    )
    from onebase_training.terminal import show, watched
    from onebase_training.train import train as run

    with watched() as progress:
        result = run(config, progress)
    show(result)
