"""Composed adapters against PEFT's own composition on the same 4-bit base, and in a batch with their parts."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from onebase_adapters.compose import Weighted, compose
from onebase_adapters.lowering.lower import load_adapter
from onebase_adapters.primitives.lowered_adapter import LoweredAdapter
from onebase_adapters.primitives.virtual_tokens import Layout
from onebase_engine.base.base_spec import BaseSpec
from onebase_engine.runner.batched_model import ServedModel
from support.methods import CONFIGS, save_bottleneck, save_method
from support.peers import check_as_exact, load_exact, load_plain, logits, with_adapters
from support.serving import Feeder, Stream

Lower = Callable[[Path], LoweredAdapter]


@pytest.fixture(scope="module", params=["fused", "plain"])
def model(request: pytest.FixtureRequest, tiny_model: Callable[[str], Path]) -> ServedModel:
    """On the fused kernels, and on transformers' own layers."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "plain":
            patch.setattr("onebase_engine.kernels.decoder_families.MODELS", ())
        return ServedModel.load(BaseSpec(str(tiny_model("llama")), device="cpu"), slots=12, blocks=256)


@pytest.fixture(scope="module")
def lower(model: ServedModel) -> Lower:
    return lambda folder: load_adapter(folder, folder.name, model.shape, model.weights)


def ours(model: ServedModel, adapter: LoweredAdapter, tokens: list[int]) -> torch.Tensor:
    slot = model.put(adapter)
    try:
        return Feeder(model).logits([Stream(list(tokens), slot)])[0]
    finally:
        model.remove(slot)


@pytest.mark.parametrize("weights", [(0.7, 0.3), (1.0, 1.0), (2.0, 0.25)], ids=str)
def test_low_ranks_as_peft_concatenates_them(
    model: ServedModel,
    lower: Lower,
    tiny_model: Callable[[str], Path],
    tiny_lora: Callable[..., Path],
    prompt: Any,
    weights: tuple[float, float],
) -> None:
    folders = [
        tiny_lora("llama", rank=8, seed=1),
        tiny_lora("llama", rank=3, modules=["q_proj", "down_proj"], seed=2, use_rslora=True),
    ]
    names, tokens = [str(folder) for folder in folders], prompt(40, 5)
    peers = {}
    for kind, load in {"exact": load_exact, "plain": load_plain}.items():
        peer: Any = with_adapters(load(tiny_model("llama")), folders)
        peer.add_weighted_adapter(names, list(weights), "both", combination_type="cat")
        peers[kind] = logits(peer, tokens, Path("both"))
    parts = [Weighted(folder.name, lower(folder), w) for folder, w in zip(folders, weights, strict=True)]
    found = ours(model, compose("both", parts), tokens)
    check_as_exact(found, peers["plain"], peers["exact"])
    one = ours(model, lower(folders[0]), tokens)
    assert not torch.allclose(found, one, atol=0.05)


def test_factors_as_peft_averages_them(
    model: ServedModel, lower: Lower, tiny_model: Callable[[str], Path], tmp_path: Path, prompt: Any
) -> None:
    """PEFT adds the weighted factors up; with weights that add up to 1 this is the sum of the changes."""
    folder, tokens, weights = tiny_model("llama"), prompt(40, 5), [0.7, 0.3]
    folders = [save_method(tmp_path / f"ia3-{seed}", folder, CONFIGS["ia3"](), seed=seed) for seed in (1, 2)]
    peer: Any = with_adapters(load_exact(folder), folders)
    peer.add_weighted_adapter([str(one) for one in folders], weights, "both")
    exact = logits(peer, tokens, Path("both"))
    plain = logits(peer.to(torch.bfloat16), tokens, Path("both"))
    parts = [Weighted(one.name, lower(one), weight) for one, weight in zip(folders, weights, strict=True)]
    check_as_exact(ours(model, compose("both", parts), tokens), plain, exact)


def test_dora_and_lora_as_peft_adds_them(
    model: ServedModel,
    lower: Lower,
    tiny_model: Callable[[str], Path],
    tiny_lora: Callable[..., Path],
    tmp_path: Path,
    prompt: Any,
) -> None:
    folder, tokens = tiny_model("llama"), prompt(40, 5)
    folders = [
        save_method(tmp_path / "dora", folder, CONFIGS["dora"](), seed=1),
        tiny_lora("llama", rank=8, seed=1),
    ]
    peer: Any = with_adapters(load_exact(folder), folders)
    peer.base_model.set_adapter([str(one) for one in folders])
    with torch.inference_mode():
        exact = peer(torch.tensor([tokens])).logits[0]
        plain = peer.to(torch.bfloat16)(torch.tensor([tokens])).logits[0].float()
    parts = [Weighted(one.name, lower(one), 1.0) for one in folders]
    check_as_exact(ours(model, compose("both", parts), tokens), plain, exact)


def test_in_one_batch_with_their_parts(
    model: ServedModel,
    lower: Lower,
    tiny_model: Callable[[str], Path],
    tiny_lora: Callable[..., Path],
    tmp_path: Path,
    prompt: Any,
) -> None:
    tokens = prompt(40, 5)
    one, two = (lower(tiny_lora("llama", rank=rank, seed=rank)) for rank in (8, 5))
    names = ("dora", "ia3-shared-input", "prefix-tuning", "prompt-tuning")
    made = [lower(save_method(tmp_path / name, tiny_model("llama"), CONFIGS[name]())) for name in names]
    dora, ia3, prefix, virtual = made
    houlsby, pfeiffer = (
        lower(save_bottleneck(tmp_path / name, name, "gelu", size))
        for name, size in (("houlsby", 8), ("pfeiffer", 5))
    )
    mixes: list[list[tuple[LoweredAdapter, float]]] = [
        [(one, 0.7), (two, 0.3)],
        [(one, 1.0), (two, -1.0), (dora, 0.5)],
        [(lower(tiny_lora("llama", rank=4, modules=["down_proj"], seed=3)), 2.0), (ia3, 0.5)],
        [(houlsby, 0.5), (pfeiffer, 1.5), (two, 1.0)],
        [(prefix, 1.0), (one, 0.5), (virtual, 1.0)],
    ]
    composed = [
        compose(f"mix-{number}", [Weighted(part.digest, part, weight) for part, weight in mix])
        for number, mix in enumerate(mixes)
    ]
    resident = [(0, Layout()), *((model.put(each), each.layout) for each in (one, two, *composed))]

    def streams() -> list[Stream]:
        return [
            Stream(layout.arrange(tokens, model.shape.vocab), slot, prefix=layout.prefix)
            for slot, layout in resident
        ]

    try:
        alone = [Feeder(model).logits([stream])[0][-len(tokens) :] for stream in streams()]
        together = Feeder(model).logits(streams(), sizes=[7, 23, 1, 64])
    finally:
        for slot, _ in resident[1:]:
            model.remove(slot)
    for single, mixed in zip(alone, together, strict=True):
        assert torch.equal(single, mixed[-len(tokens) :])
    for number, changed in enumerate(alone):
        assert all(not torch.allclose(changed, other, atol=0.02) for other in alone[:number])
