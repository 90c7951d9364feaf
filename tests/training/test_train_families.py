"""Every family learns by LoRA on its 4-bit base, and is served as it was trained."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from onebase_contract.settings import TrainConfig
from onebase_engine.base.base_spec import BaseSpec
from onebase_training.evaluation.evaluate_adapter import EvaluateConfig, evaluate_served
from onebase_training.training_run import train
from support.models import targets, tiny_of

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("family", tiny_of("tests/training/test_train_families.py", "trained"))
def test_a_family_learns_and_is_served_as_it_was_trained(
    family: str, tmp_path: Path, tiny_model: Callable[[str], Path]
) -> None:
    data = tmp_path / "data.jsonl"
    rows = [{"prompt": f"{'so ' * (index % 3)}{index} =", "completion": f" {index % 3}"} for index in range(18)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = TrainConfig(
        data=data, eval_data=data, output=tmp_path / "out", model=str(tiny_model(family)), method="qlora", rank=4,
        targets=tuple(targets(family)), max_steps=3, epochs=30, learning_rate=0.02, batch_tokens=256,
        metric_examples=0, device="cpu",
    )  # fmt: skip
    result = train(config)
    assert result.after.loss < 0.97 * result.before.loss
    spec = BaseSpec(config.model, device="cpu")
    served = evaluate_served(EvaluateConfig(data, spec, config.output, metric_examples=0)).adapter
    assert served is not None
    assert served.loss == pytest.approx(result.after.loss, rel=0.03, abs=0.02)
