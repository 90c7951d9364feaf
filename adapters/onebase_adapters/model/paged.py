"""Paged attention behind transformers' own seam: a function registered with its AttentionInterface, and the
cache that it reads and writes. So every decoder of transformers is served without a model file of ours."""

from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface

from onebase_adapters.base.shape import cache_shape
from onebase_adapters.batch import Context
from onebase_adapters.kernels.block import BLOCK
from onebase_adapters.kernels.contract import Kernels

ATTENTION_NAME = "onebase_paged"


class PagedKV:
    """Keys and values of all layers in blocks of 16 tokens; which block is whose is the engine's business."""

    def __init__(
        self, config: Any, blocks: int, kernels: Kernels, device: torch.device, dtype: torch.dtype = torch.bfloat16
    ) -> None:
        self._kernels = kernels
        shape = cache_shape(config)
        self.dim = shape.dim
        self.kv_heads = shape.kv_heads
        # Not zeroed: pages that nobody wrote cost no memory, and no kernel reads past a sequence's last key.
        self.k = [
            torch.empty(blocks, shape.kv_heads, shape.dim, BLOCK, dtype=dtype, device=device)
            for _ in range(shape.layers)
        ]
        self.v = [
            torch.empty(blocks, shape.kv_heads, BLOCK, shape.dim, dtype=dtype, device=device)
            for _ in range(shape.layers)
        ]

    def write(self, layer: int, k: torch.Tensor, v: torch.Tensor, context: Context) -> None:
        """k, v [T, kv_heads, dim], the last two dimensions contiguous."""
        self._kernels.write_kv(k, v, self.k[layer], self.v[layer], context.batch)

    def put(self, layer: int, k: torch.Tensor, v: torch.Tensor, slots: np.ndarray) -> None:
        """Write k, v [n, kv_heads, dim] that were not computed, at `slots` [n] as in `Batch.cache_slots`."""
        at = torch.as_tensor(slots, device=k.device)
        blocks, offsets = at // BLOCK, at % BLOCK
        self.k[layer][blocks, :, :, offsets] = k
        self.v[layer][blocks, :, offsets] = v

    def attend(
        self,
        layer: int,
        q: torch.Tensor,
        context: Context,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
    ) -> torch.Tensor:
        """q [T, heads, dim] (last two dimensions contiguous) -> [T, heads, dim]; see `reference.attend`."""
        return self._kernels.attend(q, self.k[layer], self.v[layer], context.batch, scale, window, softcap)


def hook_attention(model: nn.Module, cache: PagedKV, context: Context) -> None:
    """Give every attention module of `model` the cache and the context that the registered function reads."""
    for module in model.modules():
        if getattr(module, "layer_idx", None) is not None:
            vars(module).update(onebase_cache=cache, onebase_context=context)


def _paged_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """query [1, heads, T, dim], key and value [1, kv_heads, T, dim] -> [1, T, heads, dim]."""
    cache: PagedKV = module.onebase_cache
    context: Context = module.onebase_context
    layer = module.layer_idx
    rows = [tensor[0].transpose(0, 1).contiguous() for tensor in (query, key, value)]
    cache.write(layer, rows[1], rows[2], context)
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    return cache.attend(layer, rows[0], context, scale, sliding_window, softcap)[None], None


def register_attention() -> None:
    """Make `onebase_paged` known to transformers, with no mask: the kernel masks by position."""
    AttentionInterface.register(ATTENTION_NAME, _paged_attention)
    AttentionMaskInterface.register(ATTENTION_NAME, lambda *args, **kwargs: None)
