"""Encoders: BERT's kind, bidirectional, with every method that they take, against transformers and PEFT."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModel

from onebase import LLM
from onebase_engine.base.base_spec import BaseSpec
from onebase_engine.base.catalog import fetch_base
from onebase_engine.base.load_base import load_base, quiet_loading
from onebase_engine.engine import Engine
from onebase_engine.engine_config import EngineConfig
from onebase_engine.request import EngineRequest, Output, SamplingParams
from onebase_engine.startup import start_engine
from onebase_engine.text.answer import GenerationError
from support.models import ENCODERS, tiny_of
from support.tokenizer import save_tokenizer

LABELS = ["a", "b", "c"]
ADAPTERS: dict[str, Callable[[], peft.PeftConfig]] = {
    "lora": lambda: peft.LoraConfig(r=4, target_modules=["query", "output.dense"], task_type="FEATURE_EXTRACTION"),
    "prefix": lambda: peft.PrefixTuningConfig(num_virtual_tokens=18, task_type="FEATURE_EXTRACTION"),
    "ia3": lambda: peft.IA3Config(
        target_modules=["key", "value", "output.dense"], feedforward_modules=["output.dense"],
        task_type="FEATURE_EXTRACTION",
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=tiny_of("tests/parity/test_encoders.py", "served"))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoder") / request.param
    folder.mkdir()
    vocab = -(-save_tokenizer(folder) // 32) * 32
    torch.manual_seed(1)
    model = AutoModel.from_config(ENCODERS[request.param](vocab), dtype=torch.float32)
    for parameter in model.parameters():
        with torch.no_grad():
            parameter += 0.1 * torch.randn(parameter.shape)
    with quiet_loading():
        model.to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def engine(folder: Path) -> Engine:
    base = BaseSpec(str(folder), quantization="none", device="cpu")
    return start_engine(EngineConfig(base=base, cache_gib=0.01, max_batch_tokens=16, max_adapters=6))


def run(engine: Engine, *requests: EngineRequest) -> dict[str, Output]:
    """The outputs by id."""
    for request in requests:
        assert engine.submit(request) is None
    found = {}
    while engine.busy:
        found |= {output.id: output for output in engine.step()}
    return found


def ask(name: str, prompt: Any, adapter: str | None = None, task: Any = "embed") -> EngineRequest:
    return EngineRequest(name, tuple(prompt), SamplingParams(), adapter, task=task)


def save_adapter(target: Path, base: Path, config: peft.PeftConfig) -> Path:
    with quiet_loading(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted: Any = peft.get_peft_model(AutoModel.from_pretrained(base, dtype=torch.float32), config)
        generator = torch.Generator().manual_seed(3)
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                value = 1 + 0.3 * noise if "ia3" in name else 0.3 * noise
                parameter.data = value.bfloat16().float()
        adapted.save_pretrained(target)
    return target


def load(engine: Engine, folder: Path) -> str:
    engine.load_adapter(folder.name, folder).result()
    return folder.name


@torch.inference_mode()
def test_embeddings_as_transformers_alone_and_together(engine: Engine, folder: Path, prompt: Any) -> None:
    prompts = [prompt(length, length) for length in (1, 16, 17, 33, 90)]
    with quiet_loading():
        exact = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    alone = [run(engine, ask("x", tokens))["x"].embedding for tokens in prompts]
    together = run(engine, *(ask(str(number), tokens) for number, tokens in enumerate(prompts)))
    for number, tokens in enumerate(prompts):
        hidden = exact(torch.tensor([tokens])).last_hidden_state[0]
        expected = torch.nn.functional.normalize(hidden.mean(0), dim=0)
        assert float(torch.tensor(alone[number]) @ expected) > 0.999
        assert together[str(number)].embedding == alone[number]
    assert engine.pool.used == 0


@pytest.mark.parametrize("method", ADAPTERS)
@torch.inference_mode()
def test_methods_as_peft(method: str, engine: Engine, folder: Path, tmp_path: Path, prompt: Any) -> None:
    saved = save_adapter(tmp_path / f"{folder.name}-{method}", folder, ADAPTERS[method]())
    adapter = load(engine, saved)
    tokens = prompt(40, 8)
    with quiet_loading(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModel.from_pretrained(folder, dtype=torch.float32)
        exact: Any = peft.PeftModel.from_pretrained(model, saved).eval()
    ids = torch.tensor([tokens])
    hidden = exact(ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0]
    expected = torch.nn.functional.normalize(hidden.mean(0), dim=0)
    plain = run(engine, ask("b", tokens))["b"].embedding
    found = run(engine, ask("a", tokens, adapter), ask("b", tokens))
    assert float(torch.tensor(found["a"].embedding) @ expected) > 0.999
    assert float(torch.tensor(plain) @ expected) < 0.995
    assert found["b"].embedding == plain


def test_a_head_reads_the_first_token(engine: Engine, folder: Path, tmp_path: Path, prompt: Any) -> None:
    saved = save_adapter(tmp_path / f"{folder.name}-head", folder, ADAPTERS["lora"]())
    from safetensors.torch import load_file, save_file

    weights = saved / "adapter_model.safetensors"
    score = torch.randn(len(LABELS), 64, generator=torch.Generator().manual_seed(0))
    save_file(load_file(weights) | {"score.weight": score}, weights)
    head = {"kind": "sequence", "pooling": "first", "labels": LABELS}
    (saved / "onebase.json").write_text(json.dumps({"head": head}))
    output = run(engine, ask("c", prompt(20, 1), load(engine, saved), "classify"))["c"]
    assert len(output.probabilities) == 1
    assert abs(sum(output.probabilities[0]) - 1) < 1e-5


def test_an_encoder_generates_nothing(engine: Engine) -> None:
    refused = engine.submit(EngineRequest("g", (5, 6), SamplingParams()))
    assert refused is not None
    assert refused.error_kind == "task"


@pytest.mark.real
@torch.inference_mode()
def test_minilm_in_four_bits_is_near_itself() -> None:
    folder = fetch_base("all-minilm-l6-v2")
    engine = start_engine(EngineConfig(base=BaseSpec("all-minilm-l6-v2", device="cpu"), cache_gib=0.05))
    tokenizer = load_base(BaseSpec("all-minilm-l6-v2", device="cpu")).tokenizer
    texts = ["The cat sits on the mat.", "A feline rests on a rug.", "Interest rates rose sharply."]
    with quiet_loading():
        exact = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    vectors = []
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        vectors.append(torch.tensor(run(engine, ask("m", ids))["m"].embedding))
        expected = torch.nn.functional.normalize(exact(torch.tensor([ids])).last_hidden_state[0].mean(0), dim=0)
        assert float(vectors[-1] @ expected) > 0.95
    assert float(vectors[0] @ vectors[1]) > float(vectors[0] @ vectors[2]) + 0.2


def test_from_python_an_encoder_embeds_and_generates_nothing(folder: Path, engine: Engine) -> None:
    with LLM(str(folder), quantization="none", device="cpu", cache_gib=0.01) as llm:
        (vector,) = llm.embed([5, 6, 7])
        (own,) = run(engine, EngineRequest("same", (5, 6, 7), SamplingParams(), task="embed")).values()
        assert vector == own.embedding
        for ask in (llm.generate, lambda prompt: list(llm.stream(prompt)), lambda prompt: llm.score(prompt, "b")):
            with pytest.raises(GenerationError, match="is an encoder") as caught:
                ask("a")
            assert caught.value.kind == "task"
