"""The root command: it finds the packages' commands, and prints our errors as one line."""

import sys
from dataclasses import dataclass
from typing import Any

import pytest
import typer

from onebase.cli import main as cli
from onebase_adapters.errors import DataError


@dataclass(frozen=True)
class Entry:
    """As importlib.metadata's, and no more of it than is used."""

    name: str
    command: Any

    def load(self) -> Any:
        return self.command


def single(word: str) -> None:
    """One command."""
    print("single", word)


group = typer.Typer()


@group.callback()
def root() -> None:
    """Several commands."""


@group.command()
def inner(word: str) -> None:
    raise DataError(f"[bold] is no {word}")


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> object:
    monkeypatch.setattr(cli, "app", typer.Typer(pretty_exceptions_enable=False))
    entries = [Entry("single", single), Entry("group", group)]
    monkeypatch.setattr(cli, "entry_points", lambda group: entries)
    monkeypatch.setattr(sys, "argv", ["onebase", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code


def test_entries_are_commands_or_groups(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "single", "x") == 0
    assert capsys.readouterr().out == "single x\n"
    assert run(monkeypatch, "group", "inner", "--help") == 0
    assert "inner" in capsys.readouterr().out


def test_our_errors_are_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "group", "inner", "colour") == 1
    assert capsys.readouterr().err == "error: [bold] is no colour\n"
