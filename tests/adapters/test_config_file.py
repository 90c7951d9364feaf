"""Options from a file and from the environment, and what `onebase config` says of them."""

import tomllib
from pathlib import Path

import pytest

from onebase.cli import main as cli


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> object:
    monkeypatch.setattr("sys.argv", ["onebase", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code


FILE = """
[serve]
port = 9001
max-running = 8
admin_key = "secret"
log_json = true

[train]
data = ["a.jsonl", "b.jsonl"]
rank = 4
learning_rate = 1
rank_pattern = {q_proj = 32}
targets = ["q_proj", "v_proj"]
"""


def test_the_nearest_source_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "o.toml").write_text(FILE)
    monkeypatch.setenv("ONEBASE_SERVE_MAX_RUNNING", "7")
    monkeypatch.setenv("ONEBASE_SERVE_MAX_WAITING", "6")
    words = ("--config", str(tmp_path / "o.toml"), "--max-waiting", "5")
    assert run(monkeypatch, "config", "serve", *words) == 0
    told = capsys.readouterr().out
    for line in (
        "port = 9001  # file",
        "max_running = 7  # environment",
        "max_waiting = 5  # command line",
        "log_json = true  # file",
        "max_adapters = 256  # default",
        "# admin_key is set (file)",
        "# threads =  (default)",
    ):
        assert line in told.splitlines()
    assert "secret" not in told
    assert tomllib.loads(told)["serve"]["port"] == 9001


def test_values_are_those_of_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "o.toml").write_text(FILE)
    assert run(monkeypatch, "config", "train", "--config", str(tmp_path / "o.toml")) == 0
    found = tomllib.loads(capsys.readouterr().out)["train"]
    assert (found["data"], found["rank"], found["learning_rate"]) == (["a.jsonl", "b.jsonl"], 4, 1.0)
    assert (found["rank_pattern"], found["targets"]) == ("q_proj=32", "q_proj,v_proj")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[serve]\nprot = 1", "serve has no option 'prot' (did you mean 'port'?)"),
        ("[srve]\nport = 1", "'srve' is no command's table (did you mean 'serve'?)"),
        ("port = 1", "'port' is no command's table"),
        ('[serve]\nport = "x"', "serve.port is 'x', and must be int"),
        ("[serve]\nport = true", "serve.port is True, and must be int"),
        ("[serve]\nport = 1.5", "serve.port is 1.5, and must be int"),
        ("[serve]\nhost = 1", "serve.host is 1, and must be str"),
        ("[serve]\nlog_json = 1", "serve.log_json is 1, and must be bool"),
        ("[serve", "is not TOML"),
        (None, "cannot be read: No such file"),
    ],
)
def test_a_wrong_file_says_what_is_wrong(
    text: str | None,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if text is not None:
        (tmp_path / "o.toml").write_text(text)
    assert run(monkeypatch, "serve", "--config", str(tmp_path / "o.toml")) == 1
    told = capsys.readouterr().err
    assert told.startswith("error: ") and message in told and "o.toml" in told


def test_the_same_checks_hold_as_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "o.toml").write_text("[serve]\nport = 70000")
    assert run(monkeypatch, "serve", "--config", str(tmp_path / "o.toml")) == 2
    assert "65535" in capsys.readouterr().err
    assert run(monkeypatch, "config", "serev") == 1
    assert "There is no command 'serev' (did you mean 'serve'?)" in capsys.readouterr().err
