"""Classifiers on labels and tags, on decoders and encoders: they learn, and are served as they were trained."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel

from onebase_adapters.errors import ConfigError, DataError
from onebase_contract.settings import TrainConfig
from onebase_engine.base.base_spec import BaseSpec
from onebase_engine.base.load_base import quiet_loading
from onebase_training.evaluation.evaluate_adapter import EvaluateConfig, evaluate_served
from onebase_training.methods.attach import METHODS
from onebase_training.training_run import train
from support import models
from support.tokenizer import save_tokenizer

pytestmark = pytest.mark.slow

COLOURS = ("red", "green", "blue")
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "p-tuning-v2": ("text", {"method": "p-tuning-v2"}),
    "p-tuning-v2-tags": ("tags", {"method": "p-tuning-v2", "encoder": "mlp", "encoder_size": 32}),
    "qlora": ("text", {"method": "qlora", "head": True}),
    "bottleneck-tags": ("tags", {"method": "bottleneck", "head": True}),
    "prompt-tuning": ("text", {"method": "prompt-tuning", "head": True}),
}
ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("text", {"method": "lora"}),
    "lora-first": ("text", {"method": "lora", "pooling": "first"}),
    "lora-tags": ("tags", {"method": "lora"}),
    "prefix": ("text", {"method": "p-tuning-v2"}),
    "houlsby": ("text", {"method": "bottleneck", "placement": "houlsby"}),
    "ia3": ("tags", {"method": "ia3", "learning_rate": 0.05}),
}


def write(path: Path, kind: str, count: int) -> Path:
    rows: list[dict[str, Any]] = []
    for index in range(count):
        colour = COLOURS[index % 3]
        if kind == "text":
            rows.append({"text": f"{index} {colour}", "label": colour.upper()})
        else:
            rows.append({"tokens": ["a", colour, str(index)], "tags": ["O", colour.upper(), "N"]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_config(tmp_path: Path, model: Path, kind: str, options: dict[str, Any]) -> TrainConfig:
    return TrainConfig(
        data=write(tmp_path / "train.jsonl", kind, 42),
        eval_data=write(tmp_path / "eval.jsonl", kind, 9),
        output=tmp_path / "out",
        model=str(model),
        prompt_length=5,
        bottleneck=8,
        batch_tokens=128,
        max_steps=30,
        epochs=60,
        eval_every=15,
        device="cpu",
        **({"rank": 4, "learning_rate": 0.02, "head_learning_rate": 0.02} | options),
    )


def served_loss(config: TrainConfig) -> float:
    """The held-out part's loss per label, of the served model's probabilities."""
    base = BaseSpec(config.model, quantization=METHODS[config.method].quantization, device="cpu")
    assert config.eval_data is not None
    scored = evaluate_served(EvaluateConfig(config.eval_data, base, config.output))
    assert scored.base is None and scored.adapter is not None
    return scored.adapter.loss


@pytest.mark.parametrize("name", RUNS)
def test_on_a_decoder(name: str, tmp_path: Path, tiny_model: Callable[[str], Path]) -> None:
    kind, options = RUNS[name]
    config = make_config(tmp_path, tiny_model("llama"), kind, options)
    result = train(config)
    assert result.after.loss < 0.6 * result.before.loss
    assert result.after.score is not None
    assert result.after.score.metric == ("accuracy" if kind == "text" else "entity_f1")
    assert result.after.score.value > 0.6
    notes = json.loads((config.output / "onebase.json").read_text())["head"]
    assert notes["kind"] == ("sequence" if kind == "text" else "token")
    assert served_loss(config) == pytest.approx(result.after.loss, abs=0.03)


def test_a_head_has_a_learning_rate_of_its_own(tmp_path: Path, tiny_model: Callable[[str], Path]) -> None:
    config = make_config(
        tmp_path, tiny_model("llama"), "text", {"method": "p-tuning-v2", "head_learning_rate": 1e-9}
    )
    train(replace(config, max_steps=4, eval_every=4))
    tensors = load_file(config.output / "adapter_model.safetensors")
    assert float(tensors["score.weight"].abs().max()) < 6e-3  # as it began
    assert float(tensors["score.bias"].abs().max()) < 1e-8
    settings = json.loads((config.output / "onebase.json").read_text())["settings"]
    assert settings["head_learning_rate"] == 1e-9 and settings["learning_rate"] == 0.02
    train(replace(config, max_steps=4, eval_every=4, overwrite=True, head_learning_rate=0.02))
    moved = load_file(config.output / "adapter_model.safetensors")
    assert float(moved["score.weight"].abs().max()) > 1e-2


@pytest.fixture(scope="module", params=models.tiny_of("tests/training/test_train_heads.py", "trained"))
def encoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoder") / request.param
    folder.mkdir()
    vocab = -(-save_tokenizer(folder) // 32) * 32
    torch.manual_seed(1)
    model = AutoModel.from_config(models.ENCODERS[request.param](vocab), dtype=torch.float32)
    for parameter in model.parameters():
        with torch.no_grad():
            parameter += 0.1 * torch.randn(parameter.shape)
    with quiet_loading():
        model.to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ENCODERS)
def test_on_an_encoder(name: str, tmp_path: Path, encoder: Path) -> None:
    kind, options = ENCODERS[name]
    if name == "ia3" and encoder.name == "xlm-roberta":  # PEFT knows no targets of its own there
        options = options | {"targets": ("key", "value")}
    config = make_config(tmp_path, encoder, kind, options)
    result = train(config)
    assert result.after.loss < 0.8 * result.before.loss
    assert served_loss(config) == pytest.approx(result.after.loss, abs=0.05)


@pytest.mark.parametrize("head", [True, False])
def test_labels_called_by_other_words(head: bool, tmp_path: Path, tiny_model: Callable[[str], Path]) -> None:
    config = make_config(tmp_path, tiny_model("llama"), "text", {"method": "qlora", "head": head})
    config = replace(config, max_steps=4, label_words={"RED": "warm", "BLUE": "cold"})
    result = train(config)
    assert {sample.expected.strip() for sample in result.after.samples} == {"warm", "cold", "GREEN"}
    notes = json.loads((config.output / "onebase.json").read_text())
    assert notes["settings"]["label_words"] == {"RED": "warm", "BLUE": "cold"}
    if head:
        assert notes["head"]["labels"] == ["GREEN", "cold", "warm"]
        assert served_loss(config) == pytest.approx(result.after.loss, abs=0.03)
    with pytest.raises(DataError, match="'PINK', which is no label"):
        train(replace(config, overwrite=True, label_words={"PINK": "x"}))


def test_a_tagging_prompt_of_several_tasks_begins_another(
    tmp_path: Path, tiny_model: Callable[[str], Path]
) -> None:
    """P-tuning v2, section 3.2. The tasks' head has all of their tags, the next one has its own."""
    config = make_config(tmp_path, tiny_model("llama"), "tags", {"method": "p-tuning-v2"})
    other = tmp_path / "other.jsonl"
    rows = [{"tokens": ["say", str(index)], "tags": ["VERB", "N"]} for index in range(42)]
    other.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tasks = replace(config, data=(config.files[0], other), output=tmp_path / "tasks")
    train(tasks)
    notes = json.loads((tasks.output / "onebase.json").read_text())
    assert notes["head"]["labels"] == ["BLUE", "GREEN", "N", "O", "RED", "VERB"]
    short = replace(config, data=other, eval_data=other, max_steps=6, eval_every=6)
    plain = train(replace(short, output=tmp_path / "plain"))
    begun = train(replace(short, init_from=tasks.output, output=tmp_path / "begun"))
    assert json.loads((begun.output / "onebase.json").read_text())["head"]["labels"] == ["N", "VERB"]
    assert begun.after.loss < plain.after.loss


def test_what_a_head_cannot_learn_from_is_refused(tmp_path: Path, tiny_model: Callable[[str], Path]) -> None:
    config = make_config(tmp_path, tiny_model("llama"), "text", {"method": "p-tuning-v2"})
    same = tmp_path / "same.jsonl"
    same.write_text('{"text": "a", "label": "x"}\n{"text": "b", "label": "x"}\n')
    with pytest.raises(DataError, match="same"):
        train(replace(config, data=same))
    chats = tmp_path / "chats.jsonl"
    chats.write_text('{"prompt": "a", "completion": "x"}\n' * 9)
    with pytest.raises(DataError, match="labels"):
        train(replace(config, data=chats, eval_data=chats))
    texts, tags = write(tmp_path / "texts.jsonl", "text", 9), write(tmp_path / "tags.jsonl", "tags", 9)
    with pytest.raises(DataError, match="whole texts or words"):
        train(replace(config, data=(texts, tags)))
    with pytest.raises(ConfigError, match="last token"):
        train(replace(config, pooling="mean"))
