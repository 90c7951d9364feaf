"""Training on a mixture of experts: what is written is PEFT's, for transformers' own model, and is served so."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from onebase_adapters.errors import ConfigError
from onebase_contract.settings import TrainConfig
from onebase_engine.base.base_spec import BaseSpec
from onebase_engine.runner.batched_model import ServedModel
from onebase_training.evaluation.evaluate_adapter import EvaluateConfig, evaluate_served
from onebase_training.methods.attach import METHODS
from onebase_training.training_run import train
from support.models import tiny_of
from support.peers import load_exact, logits, with_adapters
from support.serving import Feeder, Stream, put

OPTIONS: list[dict[str, Any]] = [
    {"method": "qlora", "alpha_pattern": {"down_proj": 12.0}},
    {"method": "lora", "targets": ("mlp.experts.gate_up_proj", "q_proj", "layers.0.mlp.gate")},
]
"""One for each family."""
ANIMALS = ("cat", "dog", "cow", "owl")


def write(path: Path, count: int) -> Path:
    rows = [{"prompt": f"{n} {ANIMALS[n % 4]} =", "completion": f" {ANIMALS[n % 4]}"} for n in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def config(tmp_path: Path, tiny_model: Callable[[str], Path]) -> Callable[..., TrainConfig]:
    def make(family: str, **options: Any) -> TrainConfig:
        usual = {"rank": 4, "learning_rate": 0.02, "max_steps": 16, "epochs": 30, "eval_every": 8, "device": "cpu"}
        return TrainConfig(
            data=write(tmp_path / "train.jsonl", 40), eval_data=write(tmp_path / "eval.jsonl", 8),
            output=tmp_path / "out", model=str(tiny_model(family)), batch_tokens=128, metric_examples=4,
            **(usual | options),
        )  # fmt: skip

    return make


@pytest.mark.parametrize(
    ("family", "options"),
    [*zip(tiny_of("tests/training/test_train_mixture.py", "trained"), OPTIONS, strict=True)],
)
def test_what_is_trained_is_served_and_read_by_peft(
    family: str, options: dict[str, Any], config: Callable[..., TrainConfig]
) -> None:
    asked = config(family, **options)
    result = train(asked)
    assert result.after.loss < 0.9 * result.before.loss
    quantization = METHODS[asked.method].quantization
    spec = BaseSpec(asked.model, quantization=quantization, device="cpu")
    assert asked.eval_data is not None
    served = evaluate_served(EvaluateConfig(asked.eval_data, spec, asked.output, metric_examples=4)).adapter
    assert served is not None
    assert served.loss == pytest.approx(result.after.loss, rel=0.03, abs=0.02)

    tensors = load_file(asked.output / "adapter_model.safetensors")
    stacked = [name for name in tensors if ".experts." in name]
    assert stacked and not any(".experts.0." in name for name in stacked)
    assert all(bool(tensors[name].any()) for name in stacked)
    settings = json.loads((asked.output / "adapter_config.json").read_text())
    assert "experts.gate_up_proj" in settings["target_parameters"]
    if quantization == "none":
        return  # the oracle's experts are in 4 bits
    model = ServedModel.load(spec, slots=1, blocks=64)
    tokens = list(range(20, 60))
    (ours,) = Feeder(model).logits([Stream(tokens, put(model, asked.output))])
    exact = with_adapters(load_exact(Path(asked.model)), [asked.output])
    wanted = logits(exact, tokens, asked.output)
    # Of most tokens: rounding sends some to another expert.
    error = ((ours.float() - wanted).norm(dim=-1) / wanted.norm(dim=-1)).median()
    assert error < 0.03
    assert (wanted - logits(exact, tokens)).norm() / wanted.norm() > 10 * error


def test_a_run_goes_on_from_its_adapter(config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    first = config("mixtral", targets=("down_proj", "v_proj"), max_steps=8)
    train(first)
    again = replace(first, output=tmp_path / "again", init_from=first.output, learning_rate=1e-9, max_steps=1)
    train(again)
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (first.output, again.output))
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


@pytest.mark.parametrize(
    ("options", "field", "words"),
    [
        ({"dropout": 0.1}, "dropout", "no dropout"),
        ({"rank_pattern": {"experts.1.down_proj": 2}}, "rank_pattern", "all experts alike"),
        ({"targets": ("w1",)}, "targets", "gate_up_proj"),
        ({"method": "dora", "targets": ("down_proj",)}, "targets", "no form for a mixture"),
        ({"method": "full"}, "method", "not trained whole"),
    ],
)
def test_refused(options: dict[str, Any], field: str, words: str, config: Callable[..., TrainConfig]) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        train(config("mixtral", **options))
    assert caught.value.field == field


def test_other_methods_train_attention(config: Callable[..., TrainConfig]) -> None:
    asked = config("mixtral", method="dora", max_steps=2)
    train(asked)
    names = load_file(asked.output / "adapter_model.safetensors").keys()
    assert names and all(".self_attn." in name for name in names)
