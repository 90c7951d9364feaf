"""Beginning with a stored adapter: several tasks' prompt for one task, or more steps on new data."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from onebase_adapters.errors import AdapterMismatchError, ConfigError
from onebase_contract.settings import TrainConfig
from onebase_training.training_run import train

CAN: dict[str, dict[str, Any]] = {
    "qlora": {},
    "prompt-tuning": {"learning_rate": 0.1},
    "prefix-tuning": {"learning_rate": 0.2},
    "bottleneck": {"placement": "houlsby"},
    "ia3": {"learning_rate": 0.1},
    "lokr": {},
}


@pytest.fixture
def config(tmp_path: Path, tiny_model: Callable[[str], Path]) -> TrainConfig:
    for task, answer in (("odd", "yes"), ("even", "no")):
        rows = [{"prompt": f"{index} {task} =", "completion": f" {answer}"} for index in range(20)]
        (tmp_path / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return TrainConfig(
        data=(tmp_path / "odd.jsonl", tmp_path / "even.jsonl"),
        eval_data=tmp_path / "odd.jsonl",
        output=tmp_path / "tasks",
        model=str(tiny_model("llama")),
        rank=4,
        prompt_length=4,
        bottleneck=8,
        learning_rate=0.02,
        batch_tokens=128,
        max_steps=12,
        epochs=30,
        metric_examples=0,
        device="cpu",
    )


@pytest.mark.parametrize("method", CAN)
def test_a_run_begins_where_the_adapter_ended(method: str, config: TrainConfig, tmp_path: Path) -> None:
    first = replace(config, method=method, **CAN[method])
    several = train(first)
    assert several.after.loss < 0.9 * several.before.loss
    still = replace(first, output=tmp_path / "one", init_from=first.output, learning_rate=1e-9, max_steps=1)
    assert train(still).after.loss == pytest.approx(several.after.loss, rel=0.01)


def test_what_does_not_fit_is_refused(
    config: TrainConfig, tmp_path: Path, tiny_model: Callable[[str], Path]
) -> None:
    train(replace(config, max_steps=1))
    other = replace(config, output=tmp_path / "one", init_from=config.output)
    for change, message in (
        ({"rank": 8}, "does not fit"),
        ({"targets": ("q_proj",)}, "no place"),
        ({"method": "ia3"}, "qlora"),
        ({"method": "pissa"}, "cannot start"),
    ):
        with pytest.raises(ConfigError, match=message):
            train(replace(other, **change))
    with pytest.raises(AdapterMismatchError):
        train(replace(other, model=str(tiny_model("qwen2"))))
