"""Paged attention behind transformers' own seam: a function registered with its AttentionInterface, and the
cache that it reads and writes. So every decoder of transformers is served without a model file of ours."""

from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface

from onebase_engine.cache.kv_pages import PagedKV
from onebase_engine.runner.batching import Context

ATTENTION_NAME = "onebase_paged"


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
    cache.write(layer, rows[1], rows[2], context.batch)
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    return cache.attend(layer, rows[0], context.batch, scale, sliding_window, softcap)[None], None


def register_attention() -> None:
    """Make `onebase_paged` known to transformers, but no mask for it, so that none is made, and no number of the
    device waited for: the kernel masks by position."""
    AttentionInterface.register(ATTENTION_NAME, _paged_attention)
