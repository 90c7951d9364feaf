"""An encoder-decoder (T5): its batches' loss is transformers', it learns, and it is served as it was trained."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from onebase_adapters.errors import ConfigError
from onebase_contract.settings import TrainConfig
from onebase_engine.base.base_spec import BaseSpec
from onebase_engine.base.load_base import quiet_loading
from onebase_engine.startup import start_engine
from onebase_training.data import NO_LOSS, Encoded, encode, read_dataset
from onebase_training.data.encoding.packing import pack
from onebase_training.evaluation.evaluate_adapter import EvaluateConfig, evaluate_served
from onebase_training.model.attached import Attached
from onebase_training.model.trained_model import Trained
from onebase_training.training_run import train
from support.engines import Driver, engine_config

ANIMALS = ("cat", "dog", "cow", "owl")


def write(path: Path, count: int) -> Path:
    rows = [
        {"prompt": f"{'so ' * (index % 3)}{ANIMALS[index % 4]} =", "completion": f" {ANIMALS[index % 4]}"}
        for index in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def config(tmp_path: Path, tiny_model: Callable[[str], Path]) -> TrainConfig:
    return TrainConfig(
        data=write(tmp_path / "train.jsonl", 40),
        eval_data=write(tmp_path / "eval.jsonl", 8),
        output=tmp_path / "out",
        model=str(tiny_model("t5")),
        rank=4,
        prompt_length=5,
        batch_tokens=256,
        max_steps=24,
        epochs=30,
        eval_every=12,
        max_new_tokens=8,
        learning_rate=0.02,
        device="cpu",
    )


def held_out(config: TrainConfig) -> list[Encoded]:
    assert config.eval_data is not None
    tokenizer = AutoTokenizer.from_pretrained(config.model)
    return encode(read_dataset(config.eval_data).examples, tokenizer, max_length=128)


@torch.no_grad()
def test_a_padded_batch_has_the_loss_of_its_examples_alone(config: TrainConfig) -> None:
    examples = held_out(config)
    assert len({one.prompt_length for one in examples}) > 1
    with quiet_loading():
        model = AutoModelForSeq2SeqLM.from_pretrained(config.model, dtype=torch.float32).eval()
    trained = Trained(Attached(model, lambda _: None), torch.device("cpu"), arithmetic="float32")
    total = torch.tensor(0.0)
    for one in examples:
        ids, labels = (
            torch.tensor([part]) for part in (one.input_ids[: one.prompt_length], one.labels[one.prompt_length :])
        )
        assert NO_LOSS not in labels
        total += model(input_ids=ids, labels=labels).loss * labels.numel()
    torch.testing.assert_close(trained.eval()(**trained.collate(examples)), total)


def test_padding_counts() -> None:
    assert pack([0, 1, 2, 3], [1, 1, 9, 1], 10, padded=True) == [[0, 1], [2], [3]]


@pytest.mark.parametrize("method", ["lora", "qlora", "prompt-tuning"])
def test_it_learns_and_is_served_as_it_was_trained(method: str, config: TrainConfig) -> None:
    config = replace(config, method=method)
    if method == "prompt-tuning":  # a random model listens little to what stands before the prompt
        config = replace(config, learning_rate=0.3, prompt_length=16, max_steps=60)
    result = train(config)
    assert config.eval_data is not None
    assert result.after.loss < 0.8 * result.before.loss
    examples = held_out(config)
    base = BaseSpec(config.model, device="cpu", quantization="none" if method == "lora" else "nf4")
    scored = evaluate_served(EvaluateConfig(config.eval_data, base, config.output, metric_examples=0))
    for found, mark in ((scored.adapter, result.after), (scored.base, result.before)):
        assert found is not None
        assert found.loss == pytest.approx(mark.loss, rel=0.03, abs=0.02)
    driver = Driver(start_engine(engine_config(Path(config.model))), [config.output])
    answers = [
        driver.submit(f"{n}", one.input_ids[: one.prompt_length], config.output, ignore_eos=False, max_tokens=8)
        for n, one in enumerate(examples)
    ]
    driver.run()
    tokenizer = AutoTokenizer.from_pretrained(config.model)
    texts = [tokenizer.decode(answer.tokens, skip_special_tokens=True) for answer in answers]
    assert texts == [sample.generated for sample in result.after.samples]


@pytest.mark.parametrize("change", [{"method": "prefix-tuning"}, {"method": "hard-prompt"}, {"head": True}])
def test_other_methods_are_refused_with_those_that_work(change: dict[str, Any], config: TrainConfig) -> None:
    with pytest.raises(ConfigError, match="is an encoder-decoder: it trains with lora, qlora, prompt-tuning"):
        train(replace(config, **change))
    assert not config.output.exists()
