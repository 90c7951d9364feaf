"""The default base itself, with adapters, against transformers and PEFT on the same NF4 weights."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from onebase_engine.base.base_spec import DEFAULT_BASE, BaseSpec
from onebase_engine.base.catalog import fetch_base
from onebase_engine.runner.batched_model import ServedModel
from support.models import save_lora
from support.peers import check_as_exact, check_greedy, load_exact, load_plain, logits, with_adapters
from support.serving import Feeder, Stream, put

pytestmark = pytest.mark.real

TEXTS = (
    "The capital of France is",
    "Water boils at a lower temperature on a mountain because the pressure of the air falls with height, and",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "<|im_start|>user\nName three primary colours.<|im_end|>\n<|im_start|>assistant\n",
)


@pytest.fixture(scope="module")
def folder() -> Path:
    return fetch_base(DEFAULT_BASE)


@pytest.fixture(scope="module")
def adapters(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("real")
    return [
        save_lora(root / "all", folder, rank=8, modules="all-linear", strength=0.05),
        save_lora(root / "attention", folder, rank=16, modules=["q_proj", "v_proj"], strength=0.1),
        save_lora(root / "mlp", folder, rank=3, modules=["down_proj"], strength=0.1, use_rslora=True),
    ]


@pytest.fixture(scope="module")
def model(adapters: list[Path]) -> Iterator[tuple[ServedModel, list[int]]]:
    served = ServedModel.load(BaseSpec(device="cpu"), slots=4, blocks=512)
    yield served, [put(served, adapter) for adapter in adapters]


def test_logits_and_greedy_tokens_of_a_mixed_batch(
    folder: Path, adapters: list[Path], model: tuple[ServedModel, list[int]]
) -> None:
    served, slots = model
    tokenizer = served.base.tokenizer
    prompts = [tokenizer.encode(text) for text in TEXTS]
    owners = [None, *adapters]
    plain, exact = with_adapters(load_plain(folder), adapters), with_adapters(load_exact(folder), adapters)
    streams = [Stream(list(p), slot) for p, slot in zip(prompts, [0, *slots], strict=True)]
    found = Feeder(served).logits(streams, (7, 100, 3))
    theirs = [logits(plain, p, owner) for p, owner in zip(prompts, owners, strict=True)]
    truth = [logits(exact, p, owner) for p, owner in zip(prompts, owners, strict=True)]
    check_as_exact(torch.cat(found), torch.cat(theirs), torch.cat(truth))  # a dozen tokens alone are chance

    streams = [Stream(list(p), slot) for p, slot in zip(prompts, [0, *slots], strict=True)]
    compared = 0
    for p, ours, owner in zip(prompts, Feeder(served).greedy(streams, 16), owners, strict=True):
        compared += check_greedy(exact, p, ours, owner)
    assert compared >= 32


def test_gemma_speaks_as_transformers_lets_it() -> None:
    folder = fetch_base("gemma-3-270m")
    served = ServedModel.load(BaseSpec("gemma-3-270m", device="cpu"), slots=1, blocks=64)
    plain = load_plain(folder)
    prompt = served.base.tokenizer.encode(TEXTS[0])
    (ours,) = Feeder(served).greedy([Stream(list(prompt))], 16)
    assert check_greedy(plain, prompt, ours, None) >= 4
