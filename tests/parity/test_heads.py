"""Classification and embedding through the engine, against transformers' own classifiers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

from onebase_engine.base.base_spec import BaseSpec
from onebase_engine.base.load_base import quiet_loading
from onebase_engine.engine import Engine
from onebase_engine.engine_config import EngineConfig
from onebase_engine.request import EngineRequest, Output, SamplingParams
from onebase_engine.startup import start_engine
from support.peers import load_exact

LABELS = ["red", "green", "blue"]
TASKS = {"sequence": "SEQ_CLS", "token": "TOKEN_CLS"}
AUTO = {"sequence": AutoModelForSequenceClassification, "token": AutoModelForTokenClassification}


def classifier(model: Path, kind: str, exact: Any) -> Any:
    """transformers' classifier over the decoder of `exact`."""
    with quiet_loading():
        made = AUTO[kind].from_pretrained(model, num_labels=len(LABELS), dtype=torch.float32)
    made.model.load_state_dict(exact.model.state_dict())
    made.config.pad_token_id = 0
    return made


def save_classifier(folder: Path, model: Path, kind: str, exact: Any) -> Path:
    """LoRA with a head, as PEFT saves it, with the labels' names beside it."""
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type=TASKS[kind])
    adapted = get_peft_model(classifier(model, kind, exact), config)
    generator = torch.Generator().manual_seed(len(kind))
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator) * 0.5 / parameter.shape[-1] ** 0.5
            parameter.data = noise.bfloat16().float()
    adapted.save_pretrained(folder)
    head = {"kind": kind, "pooling": "last", "labels": LABELS}
    (folder / "onebase.json").write_text(json.dumps({"head": head}))
    return folder


@pytest.fixture(scope="module")
def engine(tiny_model: Callable[[str], Path]) -> Engine:
    base = BaseSpec(str(tiny_model("llama")), device="cpu")
    return start_engine(EngineConfig(base=base, cache_gib=0.01, max_batch_tokens=24, max_adapters=4))


def run(engine: Engine, *requests: EngineRequest) -> dict[str, Output]:
    """The last output of each."""
    for request in requests:
        assert engine.submit(request) is None
    last = {}
    while engine.busy:
        for output in engine.step():
            if output.finish_reason is not None:
                last[output.id] = output
    return last


def register(engine: Engine, folder: Path) -> str:
    info = engine.load_adapter(folder.name, folder).result()
    assert info.head is not None and info.head.labels == tuple(LABELS)
    return folder.name


def ask(name: str, prompt: Any, adapter: str | None, task: Any) -> EngineRequest:
    return EngineRequest(name, tuple(prompt), SamplingParams(max_tokens=4, temperature=0), adapter, task=task)


@pytest.mark.parametrize("kind", AUTO)
@torch.inference_mode()
def test_heads_as_transformers(
    kind: str, engine: Engine, tiny_model: Callable[[str], Path], tmp_path: Path, prompt: Any
) -> None:
    exact = load_exact(tiny_model("llama"))
    folder = save_classifier(tmp_path / kind, tiny_model("llama"), kind, exact)
    adapter = register(engine, folder)
    tokens = prompt(53, 2)  # several chunks of the step's budget
    peer = PeftModel.from_pretrained(classifier(tiny_model("llama"), kind, exact), folder).eval()
    expected = peer(torch.tensor([tokens])).logits.softmax(-1).reshape(-1, len(LABELS))
    last = run(
        engine,
        ask("a", tokens, adapter, "classify"),
        ask("b", prompt(40, 9), None, "generate"),
        ask("c", prompt(11, 3), adapter, "classify"),
        ask("d", tokens, adapter, "classify"),
    )
    found = torch.tensor(last["a"].probabilities)
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, atol=0.05, rtol=0)
    assert last["a"].probabilities == last["d"].probabilities
    assert last["b"].finish_reason == "length"
    assert engine.pool.used == 0


@torch.inference_mode()
def test_embeddings_are_mean_hidden_states(engine: Engine, tiny_model: Callable[[str], Path], prompt: Any) -> None:
    tokens = prompt(45, 4)
    hidden = load_exact(tiny_model("llama")).model(torch.tensor([tokens])).last_hidden_state[0]
    expected = torch.nn.functional.normalize(hidden.mean(0), dim=0)
    found = torch.tensor(run(engine, ask("e", tokens, None, "embed"))["e"].embedding)
    assert float(found @ expected) > 0.999
    assert abs(float(found.norm()) - 1) < 1e-4


def test_an_adapter_without_a_head_classifies_nothing(engine: Engine, prompt: Any) -> None:
    last = run(engine, ask("x", prompt(5, 1), None, "classify"))["x"]
    assert (last.finish_reason, last.error_kind) == ("error", "adapter")
