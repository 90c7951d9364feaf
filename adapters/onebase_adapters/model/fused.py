"""Decoders of the Llama kind with eight kernel calls a layer, where transformers does some forty small ones.

It runs on the transformers model's own weights and leaves its modules in place, as the definition to test
against. Projections that share an input run as one product. Only where it is exact: the classes named here,
4-bit weights on a CPU that bitsandbytes has packed kernels for. Every other model runs its own forward.
"""

import logging
from typing import Any

import torch
from torch import nn

from onebase_adapters.base.shape import BaseShape
from onebase_adapters.batch import Batch, Owners
from onebase_adapters.kernels import Kernels
from onebase_adapters.kernels.cpu import backend as cpu
from onebase_adapters.kernels.cpu.attention import NO_WINDOW
from onebase_adapters.kernels.cpu.elementwise import add_rms_norm, rope_attend, silu_mul
from onebase_adapters.kernels.cpu.matmul4bit import PackedLinear, packable
from onebase_adapters.kernels.table import LowRankTable
from onebase_adapters.model.paged import PagedKV

log = logging.getLogger(__name__)

_MODELS = ("LlamaForCausalLM", "MistralForCausalLM")
"""transformers' classes whose arithmetic is exactly this file's."""
_PROJECTIONS = (
    ("self_attn", ("q_proj", "k_proj", "v_proj")),
    ("self_attn", ("o_proj",)),
    ("mlp", ("gate_proj", "up_proj")),
    ("mlp", ("down_proj",)),
)


class Scratch:
    """Activations between a layer's kernels, one set for all layers of a model, grown as batches grow."""

    def __init__(self, *widths: int) -> None:
        self._widths = widths
        self._rows = 0
        self._buffers: list[torch.Tensor] = []

    def __call__(self, rows: int) -> list[torch.Tensor]:
        """One bfloat16 buffer of at least [rows, width] for each width, contiguous from the start."""
        if rows > self._rows:
            self._rows = rows
            self._buffers = [torch.empty(rows * width, dtype=torch.bfloat16) for width in self._widths]
        return self._buffers


class Projection:
    """Linear sites that share an input: the base's product, then the adapters' updates."""

    def __init__(self, modules: list[Any], table: LowRankTable) -> None:
        self._matmul = PackedLinear(modules)
        self._table = table

    def __call__(self, x: int, y: int, rows: int, owners: Owners) -> None:
        """Addresses of contiguous bfloat16 [rows, in] and [rows, out]."""
        self._matmul(x, y, rows)
        if len(owners.tiles):
            cpu.add_low_rank_at(x, y, owners, self._table)


class FusedLayer:
    """x + attention(norm(x)), then + mlp(norm(...)). What a layer adds last is left for the next one to add."""

    def __init__(self, layer: Any, projections: list[Projection], cache: PagedKV) -> None:
        attention = layer.self_attn
        config = attention.config
        self._qkv, self._o, self._gate_up, self._down = projections
        self._norms = (layer.input_layernorm.weight.data_ptr(), layer.post_attention_layernorm.weight.data_ptr())
        self._eps = (layer.input_layernorm.variance_epsilon, layer.post_attention_layernorm.variance_epsilon)
        self._cache = (cache.k[attention.layer_idx].data_ptr(), cache.v[attention.layer_idx].data_ptr())
        self._heads = (config.num_attention_heads, cache.kv_heads, cache.dim)
        self._scale = attention.scaling
        self._window = getattr(config, "sliding_window", None) or NO_WINDOW
        self._widths = (config.hidden_size, config.intermediate_size)

    def __call__(self, x: int, pending: int, cos: int, sin: int, buffers: list[int], batch: Batch) -> int:
        """`x` [T, hidden] is changed in place, by what was `pending` (0: nothing) first; returns what is now."""
        rows = len(batch.positions)
        hidden, intermediate = self._widths
        owners = batch.owners
        normed, qkv, attended, change, gate_up, activated = buffers
        add_rms_norm(x, pending, self._norms[0], normed, rows, hidden, self._eps[0])
        self._qkv(normed, qkv, rows, owners)
        rope_attend(
            qkv, cos, sin, attended, *self._cache, *self._heads, self._scale, self._window,
            batch.cache_slots, batch.items, batch.positions, batch.tables,
        )  # fmt: skip
        self._o(attended, change, rows, owners)
        add_rms_norm(x, change, self._norms[1], normed, rows, hidden, self._eps[1])
        self._gate_up(normed, gate_up, rows, owners)
        silu_mul(gate_up, activated, rows, intermediate)
        self._down(activated, change, rows, owners)
        return change


class FusedModel:
    """A decoder's forward pass over a flat batch, without the LM head."""

    def __init__(self, model: Any, layers: list[FusedLayer], scratch: Scratch) -> None:
        decoder = model.model
        self._embedding = decoder.embed_tokens.weight
        self._rotary = decoder.rotary_emb
        self._norm = decoder.norm
        self._layers = layers
        self._scratch = scratch

    def __call__(self, batch: Batch) -> torch.Tensor:
        """Last hidden states [n, hidden] of the batch's sample rows, ready for the LM head."""
        hidden = torch.nn.functional.embedding(batch.token_ids, self._embedding)
        cos, sin = self._rotary(hidden[None], torch.from_numpy(batch.positions)[None])
        buffers = [buffer.data_ptr() for buffer in self._scratch(len(hidden))]
        pending = 0
        for layer in self._layers:
            pending = layer(hidden.data_ptr(), pending, cos.data_ptr(), sin.data_ptr(), buffers, batch)
        wanted = hidden[batch.sample_rows]
        change = self._scratch(len(hidden))[3][: hidden.numel()].view(hidden.shape)[batch.sample_rows]
        normed = torch.empty_like(wanted)
        add_rms_norm(
            wanted.data_ptr(), change.data_ptr(), self._norm.weight.data_ptr(), normed.data_ptr(), len(wanted),
            wanted.shape[1], self._norm.variance_epsilon,
        )  # fmt: skip
        return normed


def fuse(
    model: Any, shape: BaseShape, kernels: Kernels, cache: PagedKV, slots: int
) -> tuple[FusedModel, list[LowRankTable]] | None:
    """The fused forward of `model` and the tables of the sites in its layers; None where it cannot be fused."""
    if (
        kernels is not cpu
        or type(model).__name__ not in _MODELS
        or not all(_fusable(layer) for layer in model.model.layers)
    ):
        log.info("%s keeps transformers' own layers: they do not fit the fused kernels", type(model).__name__)
        return None
    config = model.config
    hidden, heads = config.hidden_size, config.num_attention_heads * cache.dim
    scratch = Scratch(
        hidden, heads + 2 * cache.kv_heads * cache.dim, heads, hidden,
        2 * config.intermediate_size, config.intermediate_size,
    )  # fmt: skip
    layers, tables = [], []
    for index, layer in enumerate(model.model.layers):
        projections = []
        for owner, names in _PROJECTIONS:
            sites = [shape.sites[f"model.layers.{index}.{owner}.{name}"] for name in names]
            table = LowRankTable(sites, slots, transposed_a=cpu.TRANSPOSED_A)
            modules = [layer.get_submodule(f"{owner}.{name}") for name in names]
            projections.append(Projection(modules, table))
            tables.append(table)
        layers.append(FusedLayer(layer, projections, cache))
    return FusedModel(model, layers, scratch), tables


def _fusable(layer: Any) -> bool:
    linears = [module for module in layer.modules() if isinstance(module, nn.Linear)]
    return (
        type(layer.mlp.act_fn).__name__ in ("SiLU", "SiLUActivation")
        and all(packable(linear) and linear.bias is None for linear in linears)
        and layer.input_layernorm.weight.dtype == torch.bfloat16
    )
