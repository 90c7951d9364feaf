"""Bottleneck adapters against the papers' formula, written as hooks on the plain model in float32 and bfloat16."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from onebase_engine.base.base_spec import BaseSpec
from onebase_engine.runner.batched_model import ServedModel
from support.methods import save_bottleneck
from support.peers import check_as_exact, load_exact, logits
from support.serving import Feeder, Stream, put

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": torch.nn.functional.gelu,
    "relu": torch.relu,
    "silu": torch.nn.functional.silu,
    "tanh": torch.tanh,
}
CASES = [("houlsby", "gelu", 9), ("pfeiffer", "relu", 16), ("parallel", "silu", 5), ("houlsby", "tanh", 64)]


def with_bottlenecks(model: Any, folder: Path) -> Any:
    """`model` with the adapter as the papers draw it."""
    tensors = load_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    act = ACTIVATIONS[config["activation"]]

    def behind(site: str) -> Callable[..., Any]:
        def hook(_: Any, args: Any, kwargs: Any, output: Any) -> Any:
            y = output[0] if isinstance(output, tuple) else output
            part = {leaf: tensors[f"{site}.{leaf}"].to(y.dtype) for leaf in ("down.weight", "up.weight")}
            part |= {leaf: tensors[f"{site}.{leaf}"].to(y.dtype) for leaf in ("down.bias", "up.bias")}
            source = (args[0] if args else kwargs["hidden_states"]) if config["placement"] == "parallel" else y
            inner = act(source @ part["down.weight"].t() + part["down.bias"])
            changed = y + config["scale"] * (inner @ part["up.weight"].t() + part["up.bias"])
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        return hook

    for site in {name.rsplit(".", 2)[0] for name in tensors}:
        model.get_submodule(site).register_forward_hook(behind(site), with_kwargs=True)
    return model


@pytest.fixture(scope="module", params=["fused", "plain", "reference"])
def model(request: pytest.FixtureRequest, tiny_model: Callable[[str], Path]) -> ServedModel:
    """On the fused kernels, on transformers' own layers, and there without any fast kernel."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "plain":
            patch.setattr("onebase_engine.kernels.decoder_families.MODELS", ())
        if request.param == "reference":
            from onebase_engine.kernels.reference import backend as reference

            patch.setattr("onebase_engine.runner.batched_model.choose_kernels", lambda *_: reference)
        return ServedModel.load(BaseSpec(str(tiny_model("llama")), device="cpu"), slots=8, blocks=256)


@pytest.mark.parametrize(("placement", "activation", "size"), CASES)
def test_as_the_formula(
    placement: str,
    activation: str,
    size: int,
    model: ServedModel,
    tiny_model: Callable[[str], Path],
    tmp_path: Path,
    prompt: Any,
) -> None:
    folder = save_bottleneck(tmp_path / "adapter", placement, activation, size)
    tokens = prompt(37, size)
    slot = put(model, folder)
    (ours,) = Feeder(model).logits([Stream(tokens[:], slot)], sizes=[5, 1, 40])
    model.remove(slot)
    exact = logits(with_bottlenecks(load_exact(tiny_model("llama")), folder), tokens)
    rounded = logits(with_bottlenecks(load_exact(tiny_model("llama")).bfloat16(), folder), tokens)
    check_as_exact(ours, rounded, exact)


def test_mixed_with_others_the_bits_are_the_same(model: ServedModel, tmp_path: Path, prompt: Any) -> None:
    slots = [0] + [put(model, save_bottleneck(tmp_path / str(i), *case)) for i, case in enumerate(CASES)]
    tokens = prompt(33, 3)
    alone = [Feeder(model).logits([Stream(tokens[:], slot)])[0] for slot in slots]
    streams = [Stream(tokens[:], slot) for slot in (*slots, *slots)]
    together = Feeder(model).logits(streams, sizes=[9, 2, 64])
    for slot in slots[1:]:
        model.remove(slot)
    for ours, mixed in zip((*alone, *alone), together, strict=True):
        assert torch.equal(ours, mixed)
