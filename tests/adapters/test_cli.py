"""The root command: it has every command, and prints our errors as one line."""

import os
import subprocess
import sys
from importlib.metadata import version

import pytest

from onebase.cli import main as cli

COMMANDS = ("adapters", "compare", "config", "data", "evaluate", "methods", "models", "serve", "train", "tune")


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> object:
    monkeypatch.setattr(sys, "argv", ["onebase", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code


def test_every_command_is_there(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "--help") == 0
    told = capsys.readouterr().out
    assert all(f" {name} " in told for name in COMMANDS)


@pytest.mark.parametrize(
    "words", [["-h"], ["serve", "-h"], ["--version"], ["data", "check", "-h"], ["models", "-h"]]
)
def test_help_is_short_and_the_version_told(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, *words) == 0
    told = capsys.readouterr().out
    assert told == f"onebase {version('onebase')}\n" if words == ["--version"] else "Usage: onebase" in told


@pytest.mark.parametrize("encoding", ["latin-1", "ascii"])
def test_a_terminal_without_our_characters(encoding: str) -> None:
    told = subprocess.run(
        [sys.executable, "-m", "onebase.cli.main", "train", "--help"],
        env={**os.environ, "PYTHONIOENCODING": encoding},
        capture_output=True,
        check=False,
    )
    assert (told.returncode, told.stderr) == (0, b"")
    assert b"--rank" in told.stdout


def test_a_home_that_cannot_be_written_to_is_told_in_one_line() -> None:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("ONEBASE_", "XDG_"))}
    told = subprocess.run(
        [sys.executable, "-m", "onebase.cli.main", "serve", "--port", "0"],
        env={**kept, "HOME": "/proc/no-home"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert told.returncode == 1
    assert told.stderr.splitlines()[-1].startswith("error: Cannot write /proc/no-home/")


def test_our_errors_are_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "data", "check", "no-such-[bold]-file.jsonl") == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "no-such-[bold]-file.jsonl" in error
    assert error.count("\n") == 1
