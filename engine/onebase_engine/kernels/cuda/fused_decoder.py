"""`fused` on GPUs: decoders of the Llama kind with some ten kernels a layer, and projections that share an input as
one product and one low-rank update."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

from onebase_adapters.base_shape import BaseShape
from onebase_engine.kernels.adapter_interface import KeyValuePages
from onebase_engine.kernels.batch import Batch, Owners
from onebase_engine.kernels.bitsandbytes_import import Linear4bit
from onebase_engine.kernels.cuda import adapter_kernels as cuda
from onebase_engine.kernels.cuda.elementwise import add_rms_norm, gate_mul, rope_write
from onebase_engine.kernels.cuda.matmul4bit import Packed, multiplies
from onebase_engine.kernels.fusing import (
    Angles,
    LayerToFuse,
    kind_of,
    layers_to_fuse,
    may_be_fused,
    sites_of,
    sublayers_of,
    window_of,
)
from onebase_engine.kernels.site_tables import SiteTables, add_bottlenecks
from onebase_engine.kernels.tables import BottleneckTable


class Joined:
    """Plain linear modules with the same input as one, of which they keep views."""

    def __init__(self, modules: Sequence[Any]) -> None:
        self._weight = torch.cat([module.weight.data for module in modules])
        self._bias = None
        if modules[0].bias is not None:
            self._bias = torch.cat([module.bias.data for module in modules])
        row = 0
        for module in modules:
            module.weight.data = self._weight[row : row + module.out_features]
            row += module.out_features

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [rows, in] to [rows, out]."""
        return linear(x, self._weight, self._bias)


class Projection:
    """Linear sites that share an input: the base's product between the adapters' changes of input and output."""

    def __init__(self, modules: list[Any], tables: SiteTables) -> None:
        self._multiply = Packed(modules) if isinstance(modules[0], Linear4bit) else Joined(modules)
        self._modules = modules
        self._tables = tables

    def __call__(self, x: torch.Tensor, owners: Owners) -> torch.Tensor:
        """x [rows, in] to [rows, out], contiguous bfloat16."""
        if owners.affine and len(self._modules) == 1:
            x = self._tables.change_input(x, owners)
        y = self._multiply(x)
        if not len(owners.tiles):
            return y
        if owners.affine and len(self._modules) > 1:
            self._tables.recompute(x, y, owners, self._modules)
        cuda.add_low_rank(x, y, owners, self._tables.low_rank)
        if owners.affine:
            self._tables.change_output(y, owners)
        return y


class GpuLayer:
    """x + attention(norm(x)), then + mlp(norm(...)). What a layer adds last is left for the next one to add."""

    def __init__(
        self,
        parts: LayerToFuse,
        cache: KeyValuePages,
    ) -> None:
        layer, kind = parts.layer, parts.kind
        attention = layer.self_attn
        self._qkv, self._o, self._gate_up, self._down = [
            Projection(modules, tables) for modules, tables in parts.projections
        ]
        self._after_attention, self._after_mlp = parts.bottlenecks
        self._norms = [layer.get_submodule(name).weight.data for name in kind.norms]
        self._behind = (_weight(parts.before, kind.behind[1]), _weight(layer, kind.behind[0]))
        norms = _weight(attention, "q_norm"), _weight(attention, "k_norm")
        self._head_norms = None if norms[0] is None or norms[1] is None else (norms[0], norms[1])
        self._unit_offset, self._gelu = kind.unit_offset, kind.gelu
        self._eps = attention.config.rms_norm_eps
        self._cache = cache.k[attention.layer_idx], cache.v[attention.layer_idx]
        self._scale = attention.scaling
        self._window = window_of(attention)

    def __call__(
        self,
        x: torch.Tensor,
        change: torch.Tensor | None,
        angles: tuple[torch.Tensor, torch.Tensor],
        batch: Batch,
    ) -> torch.Tensor:
        """`x` [T, hidden] is changed in place, `change` is what the layer before left; returns what this leaves."""
        owners, offset, eps = batch.owners, self._unit_offset, self._eps
        normed = add_rms_norm(x, change, self._behind[0], self._norms[0], eps, unit_offset=offset)
        qkv = self._qkv(normed, owners)
        q = rope_write(qkv, self._head_norms, angles, *self._cache, batch.on_device, eps, unit_offset=offset)
        attended = cuda.attend(q, *self._cache, batch, self._scale, self._window)
        change = self._o(attended.view(len(x), -1), owners)
        if owners.bottleneck:
            add_bottlenecks(normed, change, owners, self._after_attention, cuda)
        normed = add_rms_norm(x, change, self._behind[1], self._norms[1], eps, unit_offset=offset)
        change = self._down(gate_mul(self._gate_up(normed, owners), gelu=self._gelu), owners)
        if owners.bottleneck:
            add_bottlenecks(normed, change, owners, self._after_mlp, cuda)
        return change


class GpuModel:
    """A decoder's forward pass over a flat batch, without embedding and LM head."""

    def __init__(self, model: Any, layers: list[GpuLayer], context: int, device: torch.device) -> None:
        decoder, self._kind = model.model, kind_of(model)
        self._layers = layers
        self._behind = _weight(decoder.layers[-1], self._kind.behind[1])
        self._norm = decoder.norm.weight.data
        self._eps = model.config.rms_norm_eps
        types = [Angles.layer_type(decoder.rotary_emb, layer.self_attn) for layer in decoder.layers]
        like, positions = self._norm[:0], torch.arange(context, device=device)[None]
        tables = {}
        for kind in dict.fromkeys(types):
            options = {} if kind is None else {"layer_type": kind}
            cos, sin = decoder.rotary_emb(like, positions, **options)
            tables[kind] = (cos[0].contiguous(), sin[0].contiguous())
        self._angles = [tables[kind] for kind in types]

    def __call__(self, batch: Batch, hidden: torch.Tensor) -> torch.Tensor:
        """As `Fused`."""
        change = None
        for layer, angles in zip(self._layers, self._angles, strict=True):
            change = layer(hidden, change, angles, batch)
        wanted = batch.sample_rows
        last = None if change is None else change[wanted]
        return add_rms_norm(
            hidden[wanted], last, self._behind, self._norm, self._eps, unit_offset=self._kind.unit_offset
        )


def _weight(owner: Any, name: str) -> torch.Tensor | None:
    """A norm's weight, where there is one."""
    norm = getattr(owner, name, None) if name else None
    return None if norm is None else norm.weight.data


def fuse(
    model: Any, shape: BaseShape, cache: KeyValuePages, slots: int
) -> tuple[GpuModel, list[SiteTables], list[BottleneckTable]] | None:
    """See `Kernels.fuse`."""
    if not may_be_fused(model, cache, _fits, whole_heads=True):
        return None
    device = cache.k[0].device
    parts = layers_to_fuse(model, shape, cuda, slots, device)
    fused = GpuModel(model, [GpuLayer(each, cache) for each in parts], shape.context, device)
    return fused, sites_of(parts), sublayers_of(parts)


def _fits(modules: Sequence[nn.Module]) -> bool:
    """Whether linear modules' product is known here; those of a model are all of one kind."""
    return all(
        multiplies(module) or (type(module) is nn.Linear and module.weight.dtype == torch.bfloat16)
        for module in modules
    )
