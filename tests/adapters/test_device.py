"""A model on another device than the host, for which torch's `meta` stands in: it has no numbers, so that whatever
mixes it with the host or waits for a number of it fails."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from onebase_adapters.base_shape import BaseShape
from onebase_adapters.primitives.instruction_set import (
    Bottleneck,
    Head,
    KVPrefix,
    LowRank,
    Primitive,
    Rescale,
    Shift,
    VirtualTokens,
)
from onebase_adapters.primitives.lowered_adapter import LoweredAdapter
from onebase_engine.base.base_spec import BaseSpec
from onebase_engine.base.load_base import load_base
from onebase_engine.runner import batched_model as served
from onebase_engine.runner.batched_model import ServedModel
from onebase_engine.runner.batching import Chunk
from onebase_engine.runner.paged_attention import ATTENTION_NAME, register_attention
from support.models import save_model

pytest.importorskip("triton", reason="triton is made for Linux")

from onebase_engine.kernels.cuda import attention, backend, elementwise, lowrank

META = torch.device("meta")
KERNELS = [(attention, "_attend"), (lowrank, "_shrink"), (lowrank, "_expand"), (elementwise, "_affine_rows")]
FUSED = [(elementwise, "_add_rms_norm"), (elementwise, "_rope_write"), (elementwise, "_gate_mul")]
PLAIN = [(attention, "_write_kv")]


class Launches:
    """Stands in for a kernel: counts its launches, and what they are given must be on the device."""

    def __init__(self) -> None:
        self.count = 0

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: Any, **constants: Any) -> None:
            tensors = [argument for argument in arguments if isinstance(argument, torch.Tensor)]
            assert tensors
            assert {tensor.device for tensor in tensors} == {META}
            self.count += 1

        return launch


def everything(shape: BaseShape) -> LoweredAdapter:
    """All primitives at once."""
    heads = (shape.layers, 5, shape.kv_heads, shape.head_dim)
    primitives: list[Primitive] = [
        VirtualTokens(torch.ones(3, shape.hidden), (0, 0, -1)),
        KVPrefix(torch.ones(heads), torch.ones(heads)),
        Head("sequence", "last", torch.ones(2, shape.hidden), torch.ones(2), ("a", "b")),
        LowRank(shape.embedding, torch.ones(2, shape.vocab), torch.ones(shape.hidden, 2), 1.0),
    ]
    for site in shape.sites.values():
        primitives.append(
            LowRank(site.name, torch.ones(2, site.in_features), torch.ones(site.out_features, 2), 1.0)
        )
        primitives.append(Rescale(site.name, torch.ones(site.in_features), "input"))
        primitives.append(Rescale(site.name, torch.ones(site.out_features), "output"))
        primitives.append(Shift(site.name, torch.ones(site.out_features)))
    for number, name in enumerate(sorted(shape.sublayers)):
        down, up = torch.ones(2, shape.hidden), torch.ones(shape.hidden, 2)
        parallel = bool(number % 2)
        primitives.append(Bottleneck(name, down, down[:, 0], up, up[:, 0], "relu", 1.0, parallel=parallel))
    return LoweredAdapter("all", "all", tuple(primitives))


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "glm"])
def test_a_step_stays_on_the_device(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used = [*KERNELS, *(FUSED if family == "llama" else PLAIN)]
    kernels = [Launches() for _ in used]
    for place, stand_in in zip(used, kernels, strict=True):
        monkeypatch.setattr(*place, stand_in)
    monkeypatch.setattr(served, "choose_kernels", lambda *_: backend)
    real = torch.Tensor.data_ptr
    monkeypatch.setattr(torch.Tensor, "data_ptr", lambda t: 16 if t.is_meta else real(t))  # else 0, which is none
    register_attention()
    spec = BaseSpec(str(save_model(tmp_path, family)), quantization="none", device="cpu")
    base = load_base(spec, attention=ATTENTION_NAME)
    base.model.to(META)
    model = ServedModel(replace(base, device=META), slots=2, blocks=16)
    adapter = everything(model.shape)
    slot = model.put(adapter)
    virtual = [model.shape.vocab + n for n in range(adapter.layout.tokens)]
    for chunks in (
        [Chunk([*virtual, 5, 6, 7], 0, [1, 2], slot), Chunk([1, 2, 3], 0, [3]), Chunk([9], 0, [4], slot)],
        [Chunk([4], len(virtual) + 3, [1, 2], slot), Chunk([3], 3, [3])],
    ):
        scores = model.forward(chunks)
        logits = scores.logits(range(len(chunks)))
        assert logits.device == scores.hidden([0]).device == META
        assert logits.shape[0] == len(chunks)
    assert all(kernel.count for kernel in kernels)
    model.remove(slot)
