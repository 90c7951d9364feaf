"""Every method, alone and all of them in one batch, against PEFT's own forward pass on the same 4-bit base."""

import copy
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from onebase_adapters.lowering.lower import load_adapter
from onebase_adapters.primitives.virtual_tokens import Layout
from onebase_engine.base.base_spec import BaseSpec
from onebase_engine.runner.batched_model import ServedModel
from support.methods import CONFIGS, TASKS, save_bottleneck, save_named
from support.peers import DEVICE, check_as_exact, load_exact
from support.serving import Feeder, Stream

Adapters = Callable[[str], Path]
BOTTLENECKS = {"houlsby": ("gelu", 8), "pfeiffer": ("relu", 12), "parallel": ("silu", 5)}
"""Checked against their formula elsewhere; here they share the batch."""
EVERYTHING = [*CONFIGS, *BOTTLENECKS]


@pytest.fixture(scope="module")
def adapters(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Adapters:
    root = tmp_path_factory.mktemp("methods")

    def make(name: str) -> Path:
        if name in BOTTLENECKS:
            return save_bottleneck(root / name, name, *BOTTLENECKS[name])
        return save_named(root / name, tiny_model("llama"), name, seed=len(name))

    return cache(make)


@pytest.fixture(scope="module", params=["fused", "plain"])
def model(request: pytest.FixtureRequest, tiny_model: Callable[[str], Path]) -> ServedModel:
    """On the fused kernels, and on transformers' own layers."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "plain":
            patch.setattr("onebase_engine.kernels.decoder_families.MODELS", ())
        return ServedModel.load(
            BaseSpec(str(tiny_model("llama")), device=DEVICE), slots=len(EVERYTHING), blocks=512
        )


@torch.inference_mode()
def logits_of_peft(base: Any, folder: Path, name: str, tokens: tuple[int, ...], *, exact: bool) -> torch.Tensor:
    """PEFT's logits [tokens, vocab] of an adapter on a copy of `base`, which is in float32, or all in bfloat16 (few
    of PEFT's methods run on 4-bit modules)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: Any = PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()
    if not exact:
        model.to(torch.bfloat16)
    task = {"task_ids": torch.tensor([TASKS[name]])} if name in TASKS else {}
    found: torch.Tensor = model(torch.tensor([tokens]), **task).logits[0].float()
    return found[-len(tokens) :]


@pytest.fixture(scope="module")
def peer_logits(tiny_model: Callable[[str], Path], adapters: Adapters) -> Callable[..., torch.Tensor]:
    """`logits_of_peft` of an adapter of the tiny Llama, on its NF4 form's weights."""
    base = load_exact(tiny_model("llama"))
    return cache(lambda name, tokens, *, exact: logits_of_peft(base, adapters(name), name, tokens, exact=exact))


def put(model: ServedModel, folder: Path) -> tuple[int, Layout]:
    adapter = load_adapter(folder, folder.name, model.shape, model.weights)
    return model.put(adapter), adapter.layout


def stream(model: ServedModel, tokens: tuple[int, ...], slot: int, layout: Layout) -> Stream:
    return Stream(layout.arrange(tokens, model.shape.vocab), slot, prefix=layout.prefix)


@pytest.mark.parametrize("name", CONFIGS)
def test_as_peft(
    name: str, model: ServedModel, adapters: Adapters, peer_logits: Callable[..., torch.Tensor], prompt: Any
) -> None:
    tokens = tuple(prompt(40, 5))
    slot, layout = put(model, adapters(name))
    try:
        (ours,) = Feeder(model).logits([stream(model, tokens, slot, layout)])
    finally:
        model.remove(slot)
    exact = peer_logits(name, tokens, exact=True)
    check_as_exact(ours[-len(tokens) :].cpu(), peer_logits(name, tokens, exact=False), exact)


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("gemma3", ["trainable-tokens", "lora-trainable-tokens"]),
        ("qwen2", ["glora", "road", "trainable-tokens", "lora-trained-biases"]),
    ],
)
def test_as_peft_with_scaled_embeddings_and_with_biases(
    family: str, names: list[str], tiny_model: Callable[[str], Path], tmp_path: Path, prompt: Any
) -> None:
    tokens, base = tuple(prompt(40, 5)), load_exact(tiny_model(family))
    model = ServedModel.load(BaseSpec(str(tiny_model(family)), device=DEVICE), slots=len(names), blocks=64)
    for name in filter(CONFIGS.__contains__, names):
        folder = save_named(tmp_path / name, tiny_model(family), name)
        (ours,) = Feeder(model).logits([stream(model, tokens, *put(model, folder))])
        exact, plain = (logits_of_peft(base, folder, name, tokens, exact=exact) for exact in (True, False))
        check_as_exact(ours.cpu(), plain, exact)


def test_all_methods_in_one_batch_give_the_same_bits_as_alone(
    model: ServedModel, adapters: Adapters, prompt: Any
) -> None:
    tokens = tuple(prompt(40, 5))
    weights = {name: tensor.clone() for name, tensor in model.base.model.named_parameters()}
    resident = [(0, Layout()), *(put(model, adapters(name)) for name in EVERYTHING)]
    try:
        alone = [Feeder(model).logits([stream(model, tokens, *entry)])[0] for entry in resident]
        streams = [stream(model, tokens, *entry) for entry in resident]
        together = Feeder(model).logits(streams, sizes=[7, 23, 1, 64])
    finally:
        for slot, _ in resident[1:]:
            model.remove(slot)
    for ours, mixed in zip(alone, together, strict=True):
        if DEVICE == "cpu":
            assert torch.equal(ours, mixed)
        else:  # cuBLAS sums a row in another order with other rows beside it
            assert (ours - mixed).float().norm() <= 0.05 * ours.float().norm()
    base = alone[0]
    for name, ours in zip(EVERYTHING, alone[1:], strict=True):
        assert not torch.allclose(base, ours[-len(tokens) :], atol=0.05), f"{name} changes nothing"
    for name, tensor in model.base.model.named_parameters():
        assert torch.equal(tensor, weights[name]), f"{name} of the base has changed"
