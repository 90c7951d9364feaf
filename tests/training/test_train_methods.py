"""Every method: it learns, and what is served is what was trained."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from onebase_contract.settings import TrainConfig
from onebase_engine.base.base_spec import BaseSpec
from onebase_training.evaluation.evaluate_adapter import EvaluateConfig, evaluate_served
from onebase_training.methods.attach import METHODS
from onebase_training.run_result import TrainResult
from onebase_training.training_run import train

ANIMALS = ("cat", "dog", "cow", "owl")
RUNS: dict[str, dict[str, Any]] = {
    **{name: {"method": name} for name in METHODS if name not in ("p-tuning-v2", "hard-prompt")},
    "lora-patterns": {"method": "qlora", "rank_pattern": {"q_proj": 6}, "alpha_pattern": {"down_proj": 3.0}},
    "lora-saved-head": {"method": "qlora", "modules_to_save": ("lm_head",), "targets": ("q_proj",)},
    "prompt-random": {"method": "prompt-tuning", "prompt_init": "random"},
    "prompt-text": {"method": "prompt-tuning", "prompt_init": "text", "prompt_text": "Name the animal."},
    "p-tuning-mlp-places": {"method": "p-tuning", "encoder": "mlp", "places": (0, 2, 2, -1, -1)},
    "prefix-mlp": {"method": "prefix-tuning", "encoder": "mlp", "encoder_size": 32},
    "houlsby": {"method": "bottleneck", "placement": "houlsby", "activation": "tanh"},
    "parallel": {"method": "bottleneck", "placement": "parallel", "activation": "relu", "scale": 4.0},
}
CHANGES: dict[str, dict[str, Any]] = {
    "vera": {"rank": 32},
    "oft": {"learning_rate": 0.01},
    "ia3": {"learning_rate": 0.1},
    "prompt-tuning": {"learning_rate": 0.1},
}


def write(path: Path, count: int) -> Path:
    rows = [
        {"prompt": f"{index} {ANIMALS[index % 4]} =", "completion": f" {ANIMALS[index % 4]}"}
        for index in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(tmp_path: Path, model: Path, options: dict[str, Any]) -> tuple[TrainResult, TrainConfig]:
    config = TrainConfig(
        data=write(tmp_path / "train.jsonl", 40),
        eval_data=write(tmp_path / "eval.jsonl", 8),
        output=tmp_path / "out",
        model=str(model),
        prompt_length=5,
        bottleneck=8,
        batch_tokens=128,
        max_steps=24,
        epochs=30,
        eval_every=12,
        metric_examples=4,
        device="cpu",
        **({"rank": 4, "learning_rate": 0.02} | CHANGES.get(options["method"], {}) | options),
    )
    return train(config), config


@pytest.mark.parametrize("name", RUNS)
def test_a_method_learns_and_is_served_as_it_was_trained(
    name: str, tmp_path: Path, tiny_model: Callable[[str], Path]
) -> None:
    options = RUNS[name]
    result, config = run(tmp_path, tiny_model("llama"), options)
    assert result.after.loss < 0.9 * result.before.loss
    whole = options["method"] == "full"
    assert config.eval_data is not None
    quantization = METHODS[options["method"]].quantization
    spec = BaseSpec(str(config.output) if whole else config.model, quantization=quantization, device="cpu")
    adapter = None if whole else config.output
    scored = evaluate_served(EvaluateConfig(config.eval_data, spec, adapter, metric_examples=4))
    served = scored.base if whole else scored.adapter
    assert served is not None and scored.base is not None
    assert served.loss == pytest.approx(result.after.loss, rel=0.03, abs=0.02)
    if not whole:
        assert scored.base.loss == pytest.approx(result.before.loss, rel=0.03)
    assert result.after.score is not None and served.score is not None
    assert served.score.value == result.after.score.value
    assert [one.expected for one in served.samples] == [one.expected for one in result.after.samples]
