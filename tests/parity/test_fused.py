"""The fused layers against transformers' own, behind the same served model."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import IA3Config

from onebase_engine.base.base_spec import BaseSpec
from onebase_engine.kernels.fusing import may_be_fused
from onebase_engine.runner.batched_model import ServedModel
from support.methods import save_bottleneck, save_method
from support.models import targets
from support.peers import check_as_exact, logits
from support.serving import Feeder, Stream, put

FUSED = ["llama", "mistral", "qwen2", "qwen3", "phi3", "phi3-partial", "gemma3", "glm", "glm4"]


@pytest.mark.parametrize("family", FUSED)
def test_fused_layers_give_what_transformers_layers_give(
    family: str,
    served: Callable,
    tiny_model: Callable[[str], Path],
    prompt: Callable,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    it = served(family)
    assert it.model._fused is not None
    monkeypatch.setattr("onebase_engine.kernels.cpu.backend.fuse", lambda *_: None)
    unfused = ServedModel.load(BaseSpec(str(tiny_model(family)), device="cpu"), slots=4, blocks=512)
    assert unfused._fused is None
    slots = {adapter: 0 if adapter is None else put(unfused, adapter) for adapter in it.slots}
    prompts = [prompt(40 + 7 * index, index) for index in range(len(slots))]
    ours = Feeder(it.model).logits([Stream(p, s) for p, s in zip(prompts, it.slots.values(), strict=True)])
    plain = Feeder(unfused).logits([Stream(p, s) for p, s in zip(prompts, slots.values(), strict=True)])
    exact = [logits(it.exact, tokens, adapter) for tokens, adapter in zip(prompts, slots, strict=True)]
    check_as_exact(torch.cat(ours), torch.cat(plain).float(), torch.cat(exact))


def test_all_layers_in_one_call_give_the_bits_of_layer_by_layer(
    served: Callable, prompt: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    it = served("llama")
    prompts = [prompt(40 + 7 * index, index) for index in range(len(it.slots))]

    def logits_of() -> torch.Tensor:
        streams = [Stream(p, s) for p, s in zip(prompts, it.slots.values(), strict=True)]
        return torch.cat(Feeder(it.model).logits(streams, (1, 30, 3)))

    at_once = logits_of()
    # What is said of the adapters only chooses the way: with no such weights there, it changes nothing.
    traits = it.model._traits
    monkeypatch.setattr(it.model, "_traits", replace(traits, bottleneck=np.ones_like(traits.bottleneck)))
    monkeypatch.setattr("onebase_engine.kernels.cpu.fused_decoder.run_layers", None)
    assert torch.equal(logits_of(), at_once)


@pytest.mark.parametrize("family", FUSED)
def test_bottlenecks_and_factors_change_fused_layers_as_they_change_transformers(
    family: str,
    tiny_model: Callable[[str], Path],
    tmp_path: Path,
    prompt: Callable,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Layer by layer, with norms behind the sublayers, and biases that are rescaled with their product."""
    folder = tiny_model(family)
    projections = [name for name in targets(family) if name in ("qkv_proj", "k_proj", "v_proj", "down_proj")]
    factors = IA3Config(target_modules=projections, feedforward_modules=["down_proj"], task_type="CAUSAL_LM")
    adapters = [
        save_bottleneck(tmp_path / "houlsby", "houlsby", "relu", 8),
        save_bottleneck(tmp_path / "parallel", "parallel", "relu", 8),
        save_method(tmp_path / "ia3", folder, factors),
    ]
    tokens = prompt(60, 3)

    def found() -> list[torch.Tensor]:
        model = ServedModel.load(BaseSpec(str(folder), device="cpu"), slots=4, blocks=512)
        assert (model._fused is None) == unfused
        return Feeder(model).logits(
            [Stream(tokens, slot) for slot in [0, *(put(model, each) for each in adapters)]]
        )

    unfused = False
    ours = found()
    monkeypatch.setattr("onebase_engine.kernels.cpu.backend.fuse", lambda *_: None)
    unfused = True
    plain = found()
    for mine, theirs in zip(ours, plain, strict=True):
        assert (mine - theirs).norm() < 0.03 * theirs.norm()
    assert all((mine - ours[0]).norm() > 0.1 * ours[0].norm() for mine in ours[1:])


@pytest.mark.parametrize(("family", "anywhere"), [("llama", True), ("phi3-partial", False), ("glm", False)])
def test_what_a_device_or_the_layers_do_not_compute_is_left_to_transformers(
    family: str, anywhere: bool, tiny_model: Callable[[str], Path]
) -> None:
    model = ServedModel.load(BaseSpec(str(tiny_model(family)), device="cpu"), slots=1, blocks=8)
    assert may_be_fused(model._model, model.cache, lambda _: True)
    assert may_be_fused(model._model, model.cache, lambda _: True, whole_heads=True) == anywhere
    model._model.config.final_logit_softcapping = 30.0
    assert not may_be_fused(model._model, model.cache, lambda _: True)
