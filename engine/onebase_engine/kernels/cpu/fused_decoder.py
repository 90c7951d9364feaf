"""Decoders of the Llama kind with eight kernel calls a layer, where transformers does some forty small ones.

It runs on the transformers model's own weights and leaves its modules in place, as the definition to test
against. Projections that share an input run as one product. Only where it is exact: the classes named here, with
4-bit weights that the packed product takes. Every other model runs its own forward.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numba import get_num_threads
from torch import nn

from onebase_adapters.base_shape import BaseShape
from onebase_engine.kernels.adapter_interface import KeyValuePages
from onebase_engine.kernels.batch import Batch, Owners
from onebase_engine.kernels.cpu import adapter_kernels as cpu
from onebase_engine.kernels.cpu.attention import NO_WINDOW
from onebase_engine.kernels.cpu.elementwise import add_rms_norm, gate_mul, rope_attend
from onebase_engine.kernels.cpu.matmul4bit import TASKS
from onebase_engine.kernels.cpu.packed import PackedLinear, can_be_one, packable
from onebase_engine.kernels.cpu.run_layers import LAYER, run_layers
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
from onebase_engine.kernels.interface import Fused
from onebase_engine.kernels.site_tables import SiteTables, add_bottlenecks
from onebase_engine.kernels.tables import BottleneckTable


class Scratch:
    """Activations between a layer's kernels, one set for all layers of a model, grown as batches grow."""

    def __init__(self, *widths: int) -> None:
        self._widths = widths
        self._rows = 0
        self._buffers: list[torch.Tensor] = []

    def __call__(self, rows: int) -> list[torch.Tensor]:
        """One bfloat16 buffer [rows, width] for each width."""
        if rows > self._rows:
            self._rows = rows
            self._buffers = [torch.empty(rows * width, dtype=torch.bfloat16) for width in self._widths]
        return [
            buffer[: rows * width].view(rows, width)
            for buffer, width in zip(self._buffers, self._widths, strict=True)
        ]


class Projection:
    """Linear sites that share an input: the base's product between the adapters' changes of input and output."""

    def __init__(self, modules: list[Any], tables: SiteTables) -> None:
        self._matmul = PackedLinear(modules)
        self._modules = modules
        self._tables = tables

    @property
    def description(self) -> dict[str, int]:
        """By the names of `run_layers.PROJECTION`."""
        product = TASKS[self._matmul.form].address
        return {**self._matmul.description, "product": product, **self._tables.low_rank.description}

    @property
    def sums(self) -> int:
        """float32 sums of blocks of inputs that the product takes for a row; 0 without offsets."""
        return self._matmul.sums

    def __call__(self, x: torch.Tensor, y: torch.Tensor, owners: Owners) -> None:
        """x [rows, in] to y [rows, out], contiguous bfloat16."""
        if owners.affine and len(self._modules) == 1:
            x = self._tables.change_input(x, owners)
        self._matmul(x.data_ptr(), y.data_ptr(), len(x))
        if not len(owners.tiles):
            return
        if owners.affine and len(self._modules) > 1:
            self._tables.recompute(x, y, owners, self._modules)
        cpu.add_low_rank(x, y, owners, self._tables.low_rank)
        if owners.affine:
            self._tables.change_output(y, owners)


class FusedLayer:
    """x + attention(norm(x)), then + mlp(norm(...)). What a layer adds last is left for the next one to add."""

    def __init__(
        self,
        parts: LayerToFuse,
        cache: KeyValuePages,
    ) -> None:
        layer, kind = parts.layer, parts.kind
        attention = layer.self_attn
        config = attention.config
        self._qkv, self._o, self._gate_up, self._down = [
            Projection(modules, tables) for modules, tables in parts.projections
        ]
        self.sums = max(each.sums for each in (self._qkv, self._o, self._gate_up, self._down))
        """float32 sums that a row of its widest product with offsets takes; 0 without any."""
        self._after_attention, self._after_mlp = parts.bottlenecks
        self._norms = tuple(_weight(layer, name) for name in kind.norms)
        behind_attention, behind_mlp = kind.behind
        self._behind = (_weight(parts.before, behind_mlp), _weight(layer, behind_attention))
        self._head_norms = (_weight(attention, "q_norm"), _weight(attention, "k_norm"))
        self._unit_offset, self._gelu = kind.unit_offset, kind.gelu
        self._eps = config.rms_norm_eps
        self._cache = (cache.k[attention.layer_idx].data_ptr(), cache.v[attention.layer_idx].data_ptr())
        self._heads = (config.num_attention_heads, cache.kv_heads, cache.dim)
        self._turned, self._neighbours = parts.turned, kind.neighbours
        self._scale = attention.scaling
        self._window = window_of(attention) or NO_WINDOW

    def describe(self, layer: np.ndarray) -> None:
        """Fill a `run_layers.LAYER` by name; the angles' addresses are yet to come."""
        layer["first_norm"], layer["second_norm"] = self._norms
        layer["behind_last"], layer["behind_attention"] = self._behind
        layer["q_norm"], layer["k_norm"] = self._head_norms
        layer["keys"], layer["values"] = self._cache
        layer["window"] = self._window
        projections = {"qkv": self._qkv, "o": self._o, "gate_up": self._gate_up, "down": self._down}
        for name, projection in projections.items():
            for field, number in projection.description.items():
                layer[name][field] = number

    @property
    def settings(self) -> tuple[float, int, int, int, int, bool, float, bool, bool]:
        """What layers have in common: epsilon; heads, key-value heads, dim, how much of it is rotated, and whether
        as neighbours; scale; whether norms are stored as what exceeds 1; whether the activation is gelu."""
        rotation = self._turned, self._neighbours
        return self._eps, *self._heads, *rotation, self._scale, self._unit_offset, self._gelu

    def __call__(
        self, x: torch.Tensor, first: bool, cos: int, sin: int, buffers: list[torch.Tensor], batch: Batch
    ) -> None:
        """`x` [T, hidden] is changed in place; what the layer before left in the buffer `change` is added to it
        first, unless there was none (`first`)."""
        rows, hidden = x.shape
        owners, offset = batch.owners, self._unit_offset
        normed, qkv, attended, change, gate_up, activated, _ = buffers
        at_x, at_change, at_normed = x.data_ptr(), change.data_ptr(), normed.data_ptr()
        add_rms_norm(
            at_x, 0 if first else at_change, self._behind[0], self._norms[0], offset, at_normed, rows, hidden,
            self._eps,
        )  # fmt: skip
        self._qkv(normed, qkv, owners)
        rope_attend(
            qkv.data_ptr(), *self._head_norms, offset, self._eps, cos, sin, attended.data_ptr(), *self._cache,
            *self._heads, self._turned, self._neighbours, self._scale, self._window,
            batch.cache_slots, batch.items, batch.positions, batch.visible, batch.tables,
        )  # fmt: skip
        self._o(attended, change, owners)
        if owners.bottleneck:
            add_bottlenecks(normed, change, owners, self._after_attention, cpu)
        add_rms_norm(
            at_x, at_change, self._behind[1], self._norms[1], offset, at_normed, rows, hidden, self._eps
        )  # fmt: skip
        self._gate_up(normed, gate_up, owners)
        gate_mul(gate_up.data_ptr(), self._gelu, activated.data_ptr(), rows, activated.shape[1])
        self._down(activated, change, owners)
        if owners.bottleneck:
            add_bottlenecks(normed, change, owners, self._after_mlp, cpu)


class FusedModel:
    """A decoder's forward pass over a flat batch, without embedding and LM head."""

    def __init__(self, model: Any, layers: list[FusedLayer], scratch: Scratch, context: int) -> None:
        decoder, kind = model.model, kind_of(model)
        self._norms = (
            _weight(decoder.layers[-1], kind.behind[1]),
            decoder.norm.weight.data_ptr(),
            kind.unit_offset,
        )
        self._layers = layers
        self._scratch = scratch
        self._descriptions = np.zeros(len(layers), LAYER)
        for number, layer in enumerate(layers):
            layer.describe(self._descriptions[number])
        types = [Angles.layer_type(decoder.rotary_emb, layer.self_attn) for layer in decoder.layers]
        different = list(dict.fromkeys(types))
        self._angles = [Angles(decoder.rotary_emb, layer_type, context) for layer_type in different]
        self._angles_of = np.array([different.index(layer_type) for layer_type in types])

    def __call__(self, batch: Batch, hidden: torch.Tensor) -> torch.Tensor:
        """Last hidden states [n, hidden] of the batch's sample rows, ready for the LM head, from its embeddings
        [T, hidden], which are used up."""
        angles = np.array([angles(batch.positions, hidden) for angles in self._angles], np.int64)[self._angles_of]
        rows, width = hidden.shape
        buffers = self._scratch(rows)
        settings = self._layers[0].settings
        if batch.owners.affine or batch.owners.bottleneck:
            for number, (layer, (cos, sin)) in enumerate(zip(self._layers, angles.tolist(), strict=True)):
                layer(hidden, number == 0, cos, sin, buffers, batch)
        else:
            self._descriptions["cos"], self._descriptions["sin"] = angles.T
            addresses = np.array([buffer.data_ptr() for buffer in buffers], np.int64)
            run_layers(
                get_num_threads(), self._descriptions, hidden.data_ptr(), rows, width, buffers[5].shape[1],
                *settings, addresses, batch.owners.tiles,
                batch.cache_slots, batch.items, batch.positions, batch.visible, batch.tables,
            )  # fmt: skip
        wanted, change = hidden[batch.sample_rows], buffers[3][batch.sample_rows]
        normed = torch.empty_like(wanted)
        add_rms_norm(
            wanted.data_ptr(), change.data_ptr(), *self._norms, normed.data_ptr(), len(wanted), width, settings[0]
        )
        return normed


def _weight(owner: Any, name: str) -> int:
    """Address of a norm's weight, 0 where there is none."""
    norm = getattr(owner, name, None)
    return 0 if norm is None else norm.weight.data_ptr()


def fuse(
    model: Any, shape: BaseShape, cache: KeyValuePages, slots: int
) -> tuple[Fused, list[SiteTables], list[BottleneckTable]] | None:
    """See `Kernels.fuse`."""
    if not may_be_fused(model, cache, _fit):
        return None
    config = model.config
    hidden, heads = config.hidden_size, config.num_attention_heads * cache.dim
    parts = layers_to_fuse(model, shape, cpu, slots, torch.device("cpu"))
    layers = [FusedLayer(each, cache) for each in parts]
    scratch = Scratch(
        hidden, heads + 2 * cache.kv_heads * cache.dim, heads, hidden,
        2 * config.intermediate_size, config.intermediate_size, 2 * max(layer.sums for layer in layers),
    )  # fmt: skip
    return FusedModel(model, layers, scratch, shape.context), sites_of(parts), sublayers_of(parts)


def _fit(modules: Sequence[nn.Module]) -> bool:
    return all(packable(module) for module in modules) and can_be_one(modules)
