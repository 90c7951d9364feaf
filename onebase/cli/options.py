"""The training commands' options: a field of TrainConfig is an option, and its docstring is the help.

A command names the fields that it offers and is given one TrainConfig, so each setting is told in one place.
"""

import ast
import inspect
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from functools import wraps
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from onebase.cli.config_file import ConfigFile
from onebase_contract.settings import TrainConfig
from onebase_contract.written_settings import FORMS, HINTS, read_settings

Command = Callable[..., None]
Model = Annotated[str, typer.Option(help="Base model: catalog name, folder, .gguf file, or hub id.")]
"""The base model, as an option of the commands that train nothing."""


def _docs(config: type) -> dict[str, str]:
    """The docstrings below a class's fields, which Python keeps in the source alone."""
    docs = {}
    for field, doc in pairwise(ast.walk(ast.parse(inspect.getsource(config)))):
        if isinstance(field, ast.AnnAssign) and isinstance(doc, ast.Expr):
            docs[ast.unparse(field.target)] = inspect.cleandoc(ast.literal_eval(doc.value))
    return docs


_DOCS = _docs(TrainConfig)
_CONFIG = inspect.Parameter("config_file", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=ConfigFile)

PANELS: Mapping[str, tuple[str, ...]] = {
    "What people set first": (
        *("data", "output", "method", "model", "eval_data", "epochs", "learning_rate", "rank"),
        *("resume", "overwrite"),
    ),
    "What to learn from": (
        *("eval_fraction", "format", "max_length", "too_long", "skip_bad", "label_words", "head", "pooling"),
        *("candidates", "seed"),
    ),
    "Low-rank methods": (
        *("alpha", "dropout", "targets", "rank_pattern", "alpha_pattern", "modules_to_save", "bias", "init_from"),
    ),
    "Prompts, prefixes and bottlenecks": (
        *("prompt_length", "prompt_init", "prompt_text", "places", "encoder", "encoder_size", "placement"),
        *("bottleneck", "activation", "scale"),
    ),
    "Schedule": (
        *("max_steps", "time_limit", "batch_tokens", "batch_size", "accumulate", "head_learning_rate"),
        *("learning_rate_multiplier", "schedule", "warmup", "weight_decay", "clip"),
    ),
    "Evaluation": ("eval_every", "patience", "metric_examples", "max_new_tokens"),
    "Processor and memory": (
        *("device", "arithmetic", "dequantize", "checkpointing", "deepspeed", "fsdp", "offload"),
    ),
}
"""How help groups the settings."""
_PANEL = {name: panel for panel, names in PANELS.items() for name in names}


def takes_settings(*names: str, **defaults: Any) -> Callable[[Command], Command]:
    """Make of `command(config, *, ...)` what typer calls: options for TrainConfig's fields `names` (none: for all)
    stand in the place of `config`, with `defaults` where the command's are not the trainer's."""
    defaults = {field.name: field.default for field in fields(TrainConfig)} | defaults
    chosen = names or tuple(HINTS)

    def decorate(command: Command) -> Command:
        _, *own = inspect.signature(command).parameters.values()
        options = [_option(name, defaults[name]) for name in _PANEL if name in chosen]

        @wraps(command)
        def run(config_file: Path | None = None, **values: Any) -> None:
            given = {name: values.pop(name) for name in chosen}
            command(read_settings({name: value for name, value in given.items() if value is not None}), **values)

        parameters = [*options, _CONFIG, *own]
        run.__annotations__ = {option.name: option.annotation for option in parameters}
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return run

    return decorate


def _option(name: str, default: Any) -> inspect.Parameter:
    """Return the parameter that typer reads. Without a value, the field keeps TrainConfig's own default."""
    hint = HINTS[name]
    form = FORMS.get(hint)
    if form is not None:
        hint, default = str | None, None
    elif default is MISSING:
        default = inspect.Parameter.empty
    if name == "data":
        hint = list[Path]
    flags = [f"--{name.replace('_', '-')}"] if hint is bool else []  # no --no-...
    option = typer.Option(
        *flags, help=escape(_DOCS[name]), metavar=form, show_envvar=False, rich_help_panel=_PANEL[name]
    )
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[hint, option]
    )
