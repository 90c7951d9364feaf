"""Comparisons: what is recommended, and that each run is what `onebase train` would give."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

from onebase_adapters.errors import ConfigError
from onebase_training.compare import Entry, choose, compare
from onebase_training.compare_show import render, table_rows
from onebase_training.config import TrainConfig
from onebase_training.evaluate import Evaluation, Sample
from onebase_training.metrics import score
from onebase_training.result import TrainResult
from onebase_training.train import train


def entry(method: str, right: int, size: int, of: int = 60, loss: float = 1.0) -> Entry:
    """A method that has the first `right` of its answers right."""
    samples = [Sample("?", "yes", "yes" if number < right else "no") for number in range(of)]
    marks = score("accuracy", [one.generated for one in samples], [one.expected for one in samples])
    after = Evaluation(loss, marks, samples)
    result = TrainResult(Path(), after, after, 5, 1000 * right, 1.0, 2.5, 1 << 20, "done", {}, [], [])
    return Entry(method, result, size, 10, 0)


@pytest.mark.parametrize(
    ("entries", "chosen", "why"),
    [
        ([entry("big", 58, 900), entry("small", 30, 10)], "big", "beyond chance"),
        ([entry("big", 58, 900), entry("small", 57, 10)], "small", "not beyond chance"),
        ([entry("big", 57, 900), entry("small", 58, 10)], "small", "the best"),
        ([entry("one", 3, 10)], "one", "the best"),
    ],
)
def test_the_smallest_of_those_within_chance_of_the_best(entries: Sequence[Entry], chosen: str, why: str) -> None:
    choice = choose(entries)
    assert choice.method == chosen
    assert why in choice.reason


def test_the_table_begins_with_the_best_and_the_page_shows_all() -> None:
    entries = [entry("worse", 10, 5), replace(entry("better", 50, 7), products=None)]
    rows = table_rows(entries)
    assert [row[0] for row in rows] == ["better", "worse"]
    assert "a base of its own" in rows[0]
    page = render(entries, choose(entries), "<title>")
    assert page.count("<circle") == 12
    assert "<title>&lt;title&gt;</title>" in page


def test_runs_are_those_of_train(tmp_path: Path, tiny_model: Callable[[str], Path]) -> None:
    data = tmp_path / "data.jsonl"
    rows = [{"prompt": f"{index} =", "completion": f" {index % 2}"} for index in range(40)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = TrainConfig(
        data=data,
        output=tmp_path / "all",
        model=str(tiny_model("llama")),
        max_steps=3,
        metric_examples=4,
        device="cpu",
    )
    (found,) = compare(config, ["lora"], train)
    assert found.products == found.result.parameters
    assert found.result.peak_memory > 1 << 20
    train(replace(config, method="lora", output=tmp_path / "alone"))
    alone = load_file(tmp_path / "alone" / "adapter_model.safetensors")
    among = load_file(tmp_path / "all" / "lora" / "adapter_model.safetensors")
    assert all((alone[name] == among[name]).all() for name in alone)
    with pytest.raises(ConfigError, match="magic"):
        compare(config, ["lora", "magic"], train)


def test_an_existing_output_is_refused(tmp_path: Path) -> None:
    from onebase_training.compare import output_of

    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(ConfigError, match="exists"):
        output_of(TrainConfig(data=tmp_path / "data.jsonl", output=tmp_path))
