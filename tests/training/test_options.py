"""The options of the command line are the fields of TrainConfig, with their docstrings and their types."""

import inspect
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from onebase.cli.compare import compare
from onebase.cli.options import PANELS, takes_settings
from onebase.cli.train import train
from onebase.cli.tune import tune
from onebase_adapters.errors import ConfigError
from onebase_contract.settings import TrainConfig

NEEDED = ["--data", "d.jsonl", "--output", "o"]


def invoke(arguments: list[str], seen: list[TrainConfig], *, catch: bool = True) -> Result:
    app = typer.Typer()

    @app.command()
    @takes_settings()
    def command(config: TrainConfig, *, loud: bool = False) -> None:
        seen.append(config)

    return CliRunner().invoke(app, arguments, catch_exceptions=catch, env={"COLUMNS": "1000"})


def test_every_setting_is_an_option_of_train() -> None:
    assert {field.name for field in fields(TrainConfig)} < set(inspect.signature(train).parameters)


@pytest.mark.parametrize("command", [train, tune, compare])
def test_help_is_the_docstring(command: Any) -> None:
    app = typer.Typer()
    app.command()(command)
    shown = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "1000"}).output
    assert "Most tokens of one example; never more than the base's context." in shown
    assert "Share of `data` that is held out, in (0, 1)." in shown


def test_every_setting_has_its_panel_once() -> None:
    names = [name for panel in PANELS.values() for name in panel]
    assert sorted(names) == sorted(field.name for field in fields(TrainConfig))


def test_without_options_it_is_the_trainers_default() -> None:
    seen: list[TrainConfig] = []
    assert invoke(NEEDED, seen).exit_code == 0
    assert seen == [TrainConfig(data=(Path("d.jsonl"),), output=Path("o"))]


@pytest.mark.parametrize(
    ("options", "field", "value"),
    [
        (["--data", "e.jsonl"], "data", (Path("d.jsonl"), Path("e.jsonl"))),
        (["--targets", "q_proj, v_proj"], "targets", ("q_proj", "v_proj")),
        (["--places", "0,-1"], "places", (0, -1)),
        (["--rank-pattern", "q_proj=32,layers.0.mlp=4"], "rank_pattern", {"q_proj": 32, "layers.0.mlp": 4}),
        (["--alpha-pattern", "q_proj=0.5"], "alpha_pattern", {"q_proj": 0.5}),
        (["--label-words", "0=a=b,1=not so"], "label_words", {"0": "a=b", "1": "not so"}),
        (["--encoder", "lstm"], "encoder", "lstm"),
        (["--learning-rate", "1e-3"], "learning_rate", 1e-3),
        (["--head"], "head", True),
    ],
)
def test_values(options: list[str], field: str, value: Any) -> None:
    seen: list[TrainConfig] = []
    done = invoke([*NEEDED, *options], seen)
    assert done.exit_code == 0, done.output
    assert getattr(seen[0], field) == value
    if isinstance(value, Mapping):
        assert [type(found) for found in getattr(seen[0], field).values()] == [type(one) for one in value.values()]


@pytest.mark.parametrize(
    ("option", "value", "form"),
    [
        ("--places", "0,x", "INTEGER,..."),
        ("--rank-pattern", "q_proj", "NAME=INTEGER,..."),
        ("--rank-pattern", "q_proj=3.5", "NAME=INTEGER,..."),
        ("--label-words", "=x", "NAME=TEXT,..."),
        ("--label-words", "a=", "NAME=TEXT,..."),
    ],
)
def test_bad_forms_name_the_field(option: str, value: str, form: str) -> None:
    with pytest.raises(ConfigError) as caught:
        invoke([*NEEDED, option, value], [], catch=False)
    assert caught.value.field == option[2:].replace("-", "_")
    assert form in caught.value.message
    assert value in caught.value.message


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--output", "o"], "--data"),
        ([*NEEDED, "--schedule", "steep"], "'cosine'"),
        ([*NEEDED, "--rank", "many"], "--rank"),
        ([*NEEDED, "--no-head"], "--no-head"),
    ],
)
def test_what_typer_refuses(arguments: list[str], said: str) -> None:
    seen: list[TrainConfig] = []
    done = invoke(arguments, seen)
    assert done.exit_code == 2
    assert said in done.output
    assert seen == []


def test_a_commands_own_defaults() -> None:
    assert inspect.signature(tune).parameters["epochs"].default == 1.0
    assert inspect.signature(compare).parameters["epochs"].default == TrainConfig.epochs
