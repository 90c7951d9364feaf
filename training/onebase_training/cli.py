"""`onebase train`: the command line, resolved to one TrainConfig. What is heavy is imported once it is needed."""

import enum
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from onebase_adapters.base.catalog import DEFAULT_BASE
from onebase_adapters.errors import ConfigError
from onebase_training import options


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


class Bias(enum.StrEnum):
    """Which biases are trained."""

    NONE = "none"
    ALL = "all"
    LORA_ONLY = "lora_only"


class PromptInit(enum.StrEnum):
    """What virtual tokens or a prefix begin with."""

    RANDOM = "random"
    VOCAB = "vocab"
    TEXT = "text"


class Encoder(enum.StrEnum):
    """What makes virtual tokens while training."""

    LSTM = "lstm"
    MLP = "mlp"
    NONE = "none"


class Placement(enum.StrEnum):
    """Where bottleneck adapters go."""

    HOULSBY = "houlsby"
    PFEIFFER = "pfeiffer"
    PARALLEL = "parallel"


class Activation(enum.StrEnum):
    """Of bottleneck adapters."""

    RELU = "relu"
    GELU = "gelu"
    SILU = "silu"
    TANH = "tanh"


class DeepSpeed(enum.StrEnum):
    """What is spread over processes."""

    NONE = "none"
    ZERO2 = "zero2"
    ZERO3 = "zero3"


class Pooling(enum.StrEnum):
    """What a classifier reads."""

    FIRST = "first"
    LAST = "last"
    MEAN = "mean"


def train(
    *,
    data: options.Data,
    output: Annotated[Path, typer.Option(help="Folder of the result.")],
    method: options.MethodName = "qlora",
    model: options.Model = DEFAULT_BASE,
    eval_data: options.EvalData = None,
    eval_fraction: options.EvalFraction = 0.1,
    format: options.Format = None,
    max_length: options.MaxLength = 1024,
    too_long: Annotated[TooLong, typer.Option(help="What happens to a longer one.")] = TooLong.ERROR,
    rank: Annotated[int | None, typer.Option(help="Of updates that have one; default: the method's.")] = None,
    alpha: Annotated[float | None, typer.Option(help="Scale of low-rank updates, times rank.")] = None,
    dropout: Annotated[float, typer.Option(help="On the input of low-rank updates.")] = 0.0,
    targets: Annotated[str, typer.Option(help="Modules to update, e.g. q_proj,v_proj; default: by method.")] = "",
    rank_pattern: Annotated[str, typer.Option(help="Other ranks for some, e.g. q_proj=32,layers.0.mlp=4.")] = "",
    alpha_pattern: Annotated[str, typer.Option(help="Other alphas, likewise.")] = "",
    modules_to_save: Annotated[str, typer.Option(help="Modules to train whole, e.g. lm_head.")] = "",
    bias: Annotated[Bias, typer.Option(help="Which of the base's biases are trained.")] = Bias.NONE,
    prompt_length: Annotated[int, typer.Option(help="Virtual tokens.")] = 20,
    prompt_init: Annotated[PromptInit, typer.Option(help="What they begin with.")] = PromptInit.VOCAB,
    prompt_text: Annotated[str, typer.Option(help="For --prompt-init text.")] = "",
    places: Annotated[
        str, typer.Option(help="Of P-tuning's tokens, e.g. 0,0,3,-1: before the first, third, after the last.")
    ] = "",
    encoder: Annotated[Encoder | None, typer.Option(help="What makes virtual tokens while training.")] = None,
    encoder_size: Annotated[int | None, typer.Option(help="Its width; default: the base's.")] = None,
    placement: Annotated[Placement, typer.Option(help="Of bottleneck adapters.")] = Placement.PFEIFFER,
    bottleneck: Annotated[int, typer.Option(help="Their width.")] = 48,
    activation: Annotated[Activation, typer.Option(help="Inside them.")] = Activation.GELU,
    scale: Annotated[float, typer.Option(help="Of their output.")] = 1.0,
    init_from: Annotated[Path | None, typer.Option(help="An adapter of the same kind to begin with.")] = None,
    head: Annotated[bool, typer.Option("--head", help="Train a classifier on labels or tags.")] = False,
    pooling: Annotated[Pooling | None, typer.Option(help="What it reads; on encoders only.")] = None,
    candidates: Annotated[Path | None, typer.Option(help="Wordings for hard-prompt, JSON lines.")] = None,
    label_words: Annotated[
        str, typer.Option(help="What labels are called to the model, e.g. 0=negative,1=positive.")
    ] = "",
    epochs: Annotated[float, typer.Option(help="Passes over the data.")] = 3.0,
    max_steps: Annotated[int | None, typer.Option(help="Most optimiser steps.")] = None,
    time_limit: Annotated[float | None, typer.Option(help="Most seconds of training.")] = None,
    batch_tokens: options.BatchTokens = None,
    accumulate: Annotated[int, typer.Option(help="Forward passes in a step.")] = 1,
    batch_size: Annotated[
        int | None, typer.Option(help="Examples in a step, instead of --accumulate passes of --batch-tokens.")
    ] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak; default: the method's.")] = None,
    head_learning_rate: Annotated[float | None, typer.Option(help="A classifier's peak.")] = None,
    learning_rate_multiplier: Annotated[float, typer.Option(help="Of both peaks.")] = 1.0,
    schedule: Annotated[Schedule, typer.Option(help="From the peak downwards.")] = Schedule.COSINE,
    warmup: Annotated[float, typer.Option(help="Share of steps of rising learning rate.")] = 0.05,
    weight_decay: Annotated[float, typer.Option(help="AdamW's.")] = 0.0,
    clip: Annotated[float, typer.Option(help="Largest norm of the gradient; 0: any.")] = 1.0,
    seed: options.Seed = 0,
    eval_every: Annotated[int | None, typer.Option(help="Steps between evaluations; default: 8 in a run.")] = None,
    patience: Annotated[int, typer.Option(help="Evaluations without gain before it stops; 0: never.")] = 3,
    metric_examples: options.MetricExamples = 64,
    max_new_tokens: options.MaxNewTokens = 128,
    device: options.Device = "auto",
    dequantize: Annotated[
        Choice, typer.Option(help="Hold frozen 4-bit weights as bfloat16: the same values, faster.")
    ] = Choice.AUTO,
    checkpointing: Annotated[
        Choice, typer.Option(help="Recompute activations: less memory, slower.")
    ] = Choice.AUTO,
    deepspeed: Annotated[
        DeepSpeed, typer.Option(help="Under torchrun: spread optimiser, gradients (zero2) and weights (zero3).")
    ] = DeepSpeed.NONE,
    fsdp: Annotated[
        bool, typer.Option("--fsdp", help="Under torchrun: the same as zero3, by torch itself.")
    ] = False,
    offload: Annotated[bool, typer.Option("--offload", help="With either: use the host's memory, too.")] = False,
    tensorboard: Annotated[Path | None, typer.Option(help="Write curves for tensorboard into this folder.")] = None,
    json_events: Annotated[
        bool, typer.Option("--json", help="Tell of progress in lines of JSON on standard output.")
    ] = False,
    overwrite: options.Overwrite = False,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an unfinished run.")] = False,
) -> None:
    """Train an adapter from a data file."""
    from onebase_training.config import TrainConfig

    config = TrainConfig(
        data=tuple(data),
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
        targets=_names(targets),
        rank_pattern={name: int(value) for name, value in _pairs(rank_pattern, "rank_pattern").items()},
        alpha_pattern=_pairs(alpha_pattern, "alpha_pattern"),
        modules_to_save=_names(modules_to_save),
        bias=bias.value,
        prompt_length=prompt_length,
        prompt_init=prompt_init.value,
        prompt_text=prompt_text,
        places=_integers(places, "places"),
        encoder=encoder.value if encoder else None,
        encoder_size=encoder_size,
        placement=placement.value,
        bottleneck=bottleneck,
        activation=activation.value,
        scale=scale,
        init_from=init_from,
        head=head,
        pooling=pooling.value if pooling else None,
        candidates=candidates,
        label_words=_words(label_words),
        epochs=epochs,
        max_steps=max_steps,
        time_limit=time_limit,
        batch_tokens=batch_tokens,
        accumulate=accumulate,
        batch_size=batch_size,
        learning_rate=learning_rate,
        head_learning_rate=head_learning_rate,
        learning_rate_multiplier=learning_rate_multiplier,
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
        deepspeed=deepspeed.value,
        fsdp=fsdp,
        offload=offload,
        overwrite=overwrite,
        resume=resume,
    )
    from onebase_training.checkpoints import last_checkpoint, step_of
    from onebase_training.distributed import this_process
    from onebase_training.tensorboard import also_tensorboard
    from onebase_training.terminal import json_lines, show, watched
    from onebase_training.train import train as run
    from onebase_training.workspace import Workspace

    if not this_process().first:
        run(config)
        return
    shown = json_lines(sys.stdout) if json_events else watched()
    try:
        with shown as progress, also_tensorboard(progress, tensorboard) as both:
            result = run(config, both)
    except KeyboardInterrupt:
        saved = last_checkpoint(Workspace.of(config).folder)
        typer.echo(_stopped(saved, step_of(saved) if saved else 0, sys.argv), err=True)
        raise
    if not json_events:
        show(result)


def _stopped(saved: Path | None, step: int, command: Sequence[str]) -> str:
    """What is left of an interrupted run, and the command that goes on with it."""
    if saved is None:
        return "Stopped before the first checkpoint: nothing is kept."
    again = [Path(command[0]).name, *(word for word in command[1:] if word not in ("--overwrite", "--resume"))]
    return f"Stopped. Step {step} is saved, in {saved}. This goes on from it:\n  {shlex.join([*again, '--resume'])}"


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _integers(text: str, field: str) -> tuple[int, ...]:
    try:
        return tuple(map(int, _names(text)))
    except ValueError as error:
        raise ConfigError(f"{field} must be integers with commas between, found {text!r}.", field=field) from error


def _words(text: str) -> dict[str, str]:
    pairs = [pair.partition("=") for pair in _names(text)]
    if any(not name or not word for name, _, word in pairs):
        raise ConfigError(f"label_words must read LABEL=WORD,..., found {text!r}.", field="label_words")
    return {name: word for name, _, word in pairs}


def _pairs(text: str, field: str) -> dict[str, float]:
    try:
        return {name: float(value) for name, value in (pair.split("=") for pair in _names(text))}
    except ValueError as error:
        raise ConfigError(f"{field} must read NAME=NUMBER,..., found {text!r}.", field=field) from error


def methods(
    model: Annotated[str, typer.Option(help="The base that they would be trained on.")] = DEFAULT_BASE,
) -> None:
    """List the methods, and what each costs on a base with its default settings."""
    from rich.console import Console
    from rich.progress import track
    from rich.table import Table

    from onebase_training.methods import METHODS
    from onebase_training.overview import overview

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
