"""Comparisons: what is recommended, and that each run is what `onebase train` would give."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

from onebase_adapters.errors import ConfigError
from onebase_contract.events import Event, Stage
from onebase_contract.settings import TrainConfig
from onebase_training.comparison.comparison_folder import Entry
from onebase_training.comparison.comparison_page import render, table_rows
from onebase_training.comparison.method_comparison import choose, compare, known_before
from onebase_training.evaluation.evaluation_result import Evaluation, Sample
from onebase_training.evaluation.metrics import score
from onebase_training.evaluation.serving_cost import ServingCost
from onebase_training.run_result import TrainResult
from onebase_training.training_run import train


def entry(method: str, right: int, size: int, of: int = 60, base: int = 20) -> Entry:
    """A method that has the first `right` of its answers right."""

    def marks(right: int) -> Evaluation:
        samples = [Sample("?", "yes", "yes" if number < right else "no") for number in range(of)]
        score_ = score("accuracy", [one.generated for one in samples], [one.expected for one in samples])
        return Evaluation(1.0, score_, samples)

    cost = ServingCost(1.25, 3)
    return Entry(method, marks(base), marks(right), 5, "done", 1000 * right, 2.5, 1 << 20, size, cost)


@pytest.mark.parametrize(
    ("entries", "chosen", "why"),
    [
        ([entry("big", 58, 900), entry("small", 30, 10)], "big", "beyond chance"),
        ([entry("big", 58, 900), entry("small", 57, 10)], "small", "not beyond chance"),
        ([entry("big", 57, 900), entry("small", 58, 10)], "small", "the best"),
        ([entry("one", 30, 10)], "one", "no other to choose; its file is 0.00 MiB. It gains +0.167"),
        ([entry("one", 21, 10)], "one", "not better than the base"),
        ([replace(entry("a", 58, 9), cost=ServingCost(None, 0, "no")), entry("b", 9, 9)], "b", "no other"),
    ],
)
def test_the_smallest_of_those_within_chance_of_the_best(entries: Sequence[Entry], chosen: str, why: str) -> None:
    choice = choose(entries)
    assert choice.method == chosen
    assert why in choice.reason


def test_the_table_begins_with_the_best_and_the_page_shows_all() -> None:
    refused = replace(entry("vague", 5, 6), cost=ServingCost(None, 0, "its error is 9%"), stopped="plateau")
    entries = [entry("worse", 10, 5), replace(entry("better", 50, 7), cost=None), refused]
    rows = table_rows(entries)
    assert [row[0] for row in rows] == ["better", "worse", "vague"]
    assert "a base of its own" in rows[0]
    assert "+0.500" in rows[0][2]
    assert rows[1][-2:] == ["1.25", "3"]
    page = render(entries, choose(entries), "<title>")
    assert page.count("<circle") == 4 * 3 + 1 + 2  # nobody knows what is not served would cost
    assert "<title>&lt;title&gt;</title>" in page
    for remark in ("Always &#39;yes&#39;", "not served: its error is 9%", "ended early, after 5 steps: plateau"):
        assert remark in page


def test_a_classifier_has_more_marks_than_others_have() -> None:
    assert choose([entry("head", 190, 5, of=200), entry("words", 30, 6)]).method == "head"


@pytest.fixture
def config(tmp_path: Path, tiny_model: Callable[[str], Path]) -> TrainConfig:
    data = tmp_path / "data.jsonl"
    rows = [{"prompt": f"{index} =", "completion": f" {index % 2}"} for index in range(40)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = str(tiny_model("llama"))
    return TrainConfig(
        data=data, output=tmp_path / "all", model=model, max_steps=3, metric_examples=4, device="cpu"
    )


def with_known_before(config: TrainConfig, before: Evaluation | None) -> TrainResult:
    """Runs in another process."""
    return train(config, before=before)


def nothing(config: TrainConfig, before: Evaluation | None) -> TrainResult:
    raise AssertionError("nothing is to be trained")


def test_runs_are_those_of_train_and_none_is_run_twice(config: TrainConfig, tmp_path: Path) -> None:
    (found,) = compare(config, ["lora"], with_known_before)
    assert found.cost is not None
    assert found.cost.times is not None
    assert found.cost.context == 0
    assert found.peak_memory > 1 << 20
    train(replace(config, method="lora", output=tmp_path / "alone"))
    alone = load_file(tmp_path / "alone" / "adapter_model.safetensors")
    among = load_file(tmp_path / "all" / "lora" / "adapter_model.safetensors")
    assert all((alone[name] == among[name]).all() for name in alone)

    with pytest.raises(ConfigError, match="magic"):
        compare(config, ["lora", "magic"], with_known_before)
    with pytest.raises(ConfigError, match="exists"):
        compare(config, ["lora"], with_known_before)
    again = replace(config, resume=True)
    with pytest.raises(ConfigError, match="max_steps = 3"):
        compare(replace(again, max_steps=4), ["lora"], with_known_before)
    assert compare(again, ["lora"], nothing) == [found]
    told: list[Event] = []
    old, new = compare(again, ["lora", "prompt-tuning"], with_known_before, told.append)
    assert (old, new.method) == (found, "prompt-tuning")
    assert new.cost is not None
    assert new.cost.context == 20
    assert [event.text for event in told if isinstance(event, Stage)] == [
        "lora (1 of 2): finished before",
        "prompt-tuning (2 of 2)",
    ]
    config.data.write_text(config.data.read_text() * 2)  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match="train ="):
        compare(again, ["lora"], with_known_before)


def test_what_is_there_is_not_touched(config: TrainConfig) -> None:
    config.output.mkdir()
    (config.output / "mine.txt").write_text("precious")
    with pytest.raises(ConfigError, match="exists"):
        compare(config, ["lora"], nothing)
    with pytest.raises(ConfigError, match="no comparison"):
        compare(replace(config, resume=True), ["lora"], nothing)


def test_the_base_is_measured_once_for_all_that_have_the_same() -> None:
    known = entry("qlora", 1, 1).before
    config = TrainConfig(data=Path(), output=Path())
    entries = [entry("qlora", 1, 1)]
    assert known_before("dora", entries, config) == known
    assert known_before("lora", entries, config) is None  # its base is in bfloat16
    assert known_before("p-tuning-v2", entries, config) is None  # its base has a head
