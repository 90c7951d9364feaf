"""Decoder layers of the Llama kind as eight kernel calls: what transformers does in some forty small ones.

A layer takes the place of transformers' own in the model; embedding, rotary angles, final norm and head stay
transformers'. Projections that share an input run as one product. Only where it is exact: the classes named
here, 4-bit weights on a CPU that bitsandbytes has packed kernels for. Everything else keeps its own layers.
"""

import logging
from typing import Any

import torch
from torch import nn

from onebase_adapters.base.shape import BaseShape
from onebase_adapters.batch import Context
from onebase_adapters.kernels.cpu.attention import NO_WINDOW
from onebase_adapters.kernels.cpu.elementwise import add_rms_norm, rope_attend, silu_mul
from onebase_adapters.kernels.cpu.matmul4bit import PackedLinear, packable
from onebase_adapters.model.linear import LowRankTable
from onebase_adapters.model.paged import PagedKV

log = logging.getLogger(__name__)

_LAYERS = ("LlamaDecoderLayer", "MistralDecoderLayer")
"""transformers' classes whose arithmetic is exactly this file's."""


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

    def __init__(self, modules: list[Any], table: LowRankTable, context: Context) -> None:
        self._matmul = PackedLinear(modules)
        self._table = table
        self._context = context

    def __call__(self, x: int, y: int, rows: int) -> None:
        """Addresses of contiguous bfloat16 [rows, in] and [rows, out]."""
        self._matmul(x, y, rows)
        if len(self._context.batch.tiles):
            self._table.add_at(x, y, self._context)


class FusedLayer(nn.Module):
    """hidden + attention(norm(hidden)), then + mlp(norm(...)), for a flat batch, in place."""

    def __init__(
        self, layer: Any, projections: list[Projection], cache: PagedKV, context: Context, scratch: Scratch
    ) -> None:
        super().__init__()
        attention = layer.self_attn
        self.attention_type = getattr(layer, "attention_type", None)
        self._qkv, self._o, self._gate_up, self._down = projections
        self._context = context
        self._scratch = scratch
        self._norms = (layer.input_layernorm.weight, layer.post_attention_layernorm.weight)
        self._eps = (layer.input_layernorm.variance_epsilon, layer.post_attention_layernorm.variance_epsilon)
        self._cache = (cache.k[attention.layer_idx].data_ptr(), cache.v[attention.layer_idx].data_ptr())
        config = attention.config
        self._heads = (config.num_attention_heads, cache.kv_heads, cache.dim)
        self._scale = attention.scaling
        self._window = getattr(attention, "sliding_window", None) or getattr(config, "sliding_window", None)
        self._widths = (config.hidden_size, config.intermediate_size)

    def forward(
        self, hidden_states: torch.Tensor, *, position_embeddings: tuple[torch.Tensor, torch.Tensor], **_: Any
    ) -> torch.Tensor:
        """hidden_states [1, T, hidden], changed in place and returned."""
        batch = self._context.batch
        rows = hidden_states.shape[1]
        hidden, intermediate = self._widths
        normed, qkv, attended, change, gate_up, activated = (b.data_ptr() for b in self._scratch(rows))
        x = hidden_states.data_ptr()
        cos, sin = position_embeddings
        add_rms_norm(x, 0, self._norms[0].data_ptr(), normed, rows, hidden, self._eps[0])
        self._qkv(normed, qkv, rows)
        rope_attend(
            qkv, cos.data_ptr(), sin.data_ptr(), attended, *self._cache, *self._heads, self._scale,
            self._window or NO_WINDOW, batch.cache_slots, batch.items, batch.positions, batch.tables,
        )  # fmt: skip
        self._o(attended, change, rows)
        add_rms_norm(x, change, self._norms[1].data_ptr(), normed, rows, hidden, self._eps[1])
        self._gate_up(normed, gate_up, rows)
        silu_mul(gate_up, activated, rows, intermediate)
        self._down(activated, change, rows)
        hidden_states.add_(self._scratch(rows)[3][: rows * hidden].view(1, rows, hidden))
        return hidden_states


def fuse_layers(
    model: nn.Module, shape: BaseShape, cache: PagedKV, slots: int, context: Context
) -> list[LowRankTable]:
    """Replace the decoder layers that can be fused, and return the tables of the sites in them."""
    stacks = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and type(module[0]).__name__ in _LAYERS
    ]
    tables: list[LowRankTable] = []
    for stack_name, stack in stacks:
        if not all(_fusable(layer, cache) for layer in stack):
            log.info("decoder layers keep their own modules: not all of them fit the fused kernels")
            continue
        config: Any = stack[0].self_attn.config  # type: ignore[union-attr]
        hidden, wide = config.hidden_size, config.num_attention_heads * cache.dim
        scratch = Scratch(
            hidden, wide + 2 * cache.kv_heads * cache.dim, wide, hidden,
            2 * config.intermediate_size, config.intermediate_size,
        )  # fmt: skip
        for index, layer in enumerate(stack):
            projections = []
            for part, names in (
                ("self_attn", ("q_proj", "k_proj", "v_proj")),
                ("self_attn", ("o_proj",)),
                ("mlp", ("gate_proj", "up_proj")),
                ("mlp", ("down_proj",)),
            ):
                owner = getattr(layer, part)
                sites = [shape.sites[f"{stack_name}.{index}.{part}.{name}"] for name in names]
                table = LowRankTable(sites, slots, torch.device("cpu"))
                projections.append(Projection([getattr(owner, name) for name in names], table, context))
                tables.append(table)
            stack[index] = FusedLayer(layer, projections, cache, context, scratch)
    return tables


def _fusable(layer: Any, cache: PagedKV) -> bool:
    linears = [module for module in layer.modules() if isinstance(module, nn.Linear)]
    return (
        cache.fast
        and type(layer.mlp.act_fn).__name__ in ("SiLU", "SiLUActivation")
        and all(packable(linear) and linear.bias is None for linear in linears)
        and layer.input_layernorm.weight.dtype == torch.bfloat16
        and len(linears) == 7
    )
