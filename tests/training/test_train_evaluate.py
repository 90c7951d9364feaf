"""`onebase evaluate` at the command line: the table, the file, and what it refuses."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer import Typer
from typer.testing import CliRunner

from onebase.cli.evaluate import evaluate
from onebase_adapters.errors import AdapterError, DataError
from onebase_contract.settings import TrainConfig
from onebase_engine.base.base_spec import BaseSpec
from onebase_training.evaluation.evaluate_adapter import EvaluateConfig, evaluate_served
from onebase_training.training_run import train

app = Typer(pretty_exceptions_enable=False)
app.command()(evaluate)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    rows = [{"prompt": f"{index} =", "completion": f" {index % 2}"} for index in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_it_shows_and_writes_both_marks(data: Path, tmp_path: Path, tiny_model: Callable[[str], Path]) -> None:
    model = str(tiny_model("llama"))
    train(
        TrainConfig(data=data, output=tmp_path / "one", model=model, max_steps=2, metric_examples=0, device="cpu")
    )
    file = tmp_path / "marks.json"
    command = [str(tmp_path / "one"), "--data", str(data), "--model", model, "--metric-examples", "3"]
    done = CliRunner().invoke(app, [*command, "--output", str(file), "--device", "cpu"])
    assert done.exit_code == 0, done.output
    assert "perplexity" in done.stdout
    assert "exact match of 3" in done.stdout or "accuracy of 3" in done.stdout
    marks = json.loads(file.read_text())
    assert marks["adapter"]["loss"] != marks["base"]["loss"]
    assert len(marks["base"]["samples"]) == 3


def test_chats_go_through_an_adapters_own_template(tmp_path: Path, tiny_model: Callable[[str], Path]) -> None:
    data, folder = tmp_path / "chats.jsonl", tmp_path / "one"
    turns = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    data.write_text((json.dumps({"messages": turns}) + "\n") * 20)
    model = str(tiny_model("llama"))
    short = {"max_steps": 2, "metric_examples": 0, "device": "cpu"}
    train(TrainConfig(data=data, eval_data=data, output=folder, model=model, **short))
    config = EvaluateConfig(data, BaseSpec(model, device="cpu"), folder, metric_examples=1)
    usual = evaluate_served(config)
    (folder / "chat_template.jinja").write_text("{% for m in messages %}<{{ m.content }}>{% endfor %}")
    own = evaluate_served(config)
    assert usual.adapter is not None and own.adapter is not None and usual.base is not None
    assert own.adapter.loss != usual.adapter.loss
    assert own.adapter.samples[0].prompt != usual.adapter.samples[0].prompt
    assert own.base == usual.base


def test_a_bad_adapter_or_file_is_refused(data: Path, tmp_path: Path, tiny_model: Callable[[str], Path]) -> None:
    model = str(tiny_model("llama"))
    for arguments, error in (
        ([str(tmp_path), "--data", str(data)], AdapterError),
        (["--data", str(tmp_path / "none.jsonl")], DataError),
    ):
        done = CliRunner().invoke(app, [*arguments, "--model", model, "--device", "cpu"])
        assert isinstance(done.exception, error)
