"""Attention over a packed row: many examples one after another, none of which sees another.

Registered with transformers' AttentionInterface, so that every model of it trains on packed rows unchanged. Each
example is computed apart, in blocks of queries that stop at the diagonal, so no product is spent on masked pairs
beyond a block's corner. Torch's own CPU kernel takes a padded batch, and its backward pass is 2 to 5 times slower
at the lengths of training examples.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface

from onebase_adapters.errors import ConfigError

PACKED_ATTENTION = "onebase_packed"

Bounds = Sequence[tuple[int, int]]
"""Start and end of each example in the row."""

_QUERIES = 256
"""Queries of one block."""


class _Packed(torch.autograd.Function):
    """q [heads, N, dim], k and v [kv_heads, prefix + N, dim] -> [heads, N, dim].

    The first `prefix` keys are seen by every example (prefix tuning). Probabilities are made again in the backward
    pass: keeping them would need memory quadratic in an example's length, in every layer.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        bounds: Bounds,
        scale: float,
        causal: bool,
        window: int | None,
        softcap: float | None,
    ) -> torch.Tensor:
        out = torch.empty_like(q)
        prefix = k.shape[1] - q.shape[1]
        for rows, keys, mask in _blocks(bounds, prefix, causal, window, q.device):
            probabilities = _softmax(_scores(q[:, rows], _take(k, keys), scale, softcap), mask).to(q.dtype)
            grouped = probabilities.view(k.shape[0], -1, probabilities.shape[-1])
            out[:, rows] = torch.bmm(grouped, _take(v, keys)).view_as(q[:, rows])
        ctx.save_for_backward(q, k, v, out)
        ctx.settings = bounds, scale, causal, window, softcap
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, out = ctx.saved_tensors
        bounds, scale, causal, window, softcap = ctx.settings
        prefix = k.shape[1] - q.shape[1]
        grad = grad.to(q.dtype)
        dq = torch.empty_like(q)
        # Several blocks add to the same key: in float32, so that their number does not cost precision.
        dk = torch.zeros_like(k, dtype=torch.float32)
        dv = torch.zeros_like(v, dtype=torch.float32)
        # Row sums of P * dP, by the identity of FlashAttention (Dao et al. 2022, appendix B.2).
        delta = (grad.float() * out.float()).sum(-1, keepdim=True)
        for rows, keys, mask in _blocks(bounds, prefix, causal, window, q.device):
            key, value = _take(k, keys), _take(v, keys)
            scores = _scores(q[:, rows], key, scale, softcap)
            p = _softmax(scores, mask)
            grouped = (k.shape[0], -1, p.shape[-1])
            d_out = grad[:, rows].reshape(k.shape[0], -1, grad.shape[-1])
            queries = q[:, rows].reshape(k.shape[0], -1, q.shape[-1])
            _add(dv, keys, torch.bmm(p.to(q.dtype).view(grouped).transpose(1, 2), d_out))
            dp = torch.bmm(d_out, value.transpose(1, 2)).view_as(p)
            ds = (dp - delta[:, rows]).mul_(p).mul_(scale)
            if softcap is not None:
                ds *= 1 - (scores / softcap) ** 2
            ds = ds.to(q.dtype).view(grouped)
            dq[:, rows] = torch.bmm(ds, key).view_as(q[:, rows])
            _add(dk, keys, torch.bmm(ds.transpose(1, 2), queries))
        return dq, dk.to(k.dtype), dv.to(v.dtype), None, None, None, None, None


Keys = tuple[slice, slice]
"""Of the shared prefix, and of the example itself."""


def _blocks(
    bounds: Bounds, prefix: int, causal: bool, window: int | None, device: torch.device
) -> Iterator[tuple[slice, Keys, torch.Tensor | None]]:
    """For each block its rows of q, its keys, and the additive mask [rows, keys] (None: sees all)."""
    for start, end in bounds:
        for first in range(start, end, _QUERIES):
            last = min(first + _QUERIES, end)
            low = start if window is None else max(start, first - window + 1)
            high = last if causal else end
            own = slice(prefix + low, prefix + high)
            mask = _mask(first - low, last - first, high - low, prefix, window, device) if causal else None
            yield slice(first, last), (slice(0, prefix), own), mask


def _mask(offset: int, rows: int, keys: int, prefix: int, window: int | None, device: torch.device) -> torch.Tensor:
    """Row r stands at key offset + r: keys behind it are hidden, and those `window` or more before it."""
    ahead = torch.arange(keys, device=device)[None, :] - torch.arange(offset, offset + rows, device=device)[:, None]
    hidden = ahead > 0
    if window is not None:
        hidden |= ahead <= -window
    mask = torch.zeros(rows, prefix + keys, device=device)
    mask[:, prefix:].masked_fill_(hidden, -torch.inf)
    return mask


def _take(x: torch.Tensor, keys: Keys) -> torch.Tensor:
    shared, own = keys
    return torch.cat([x[:, shared], x[:, own]], dim=1) if shared.stop else x[:, own]


def _add(total: torch.Tensor, keys: Keys, part: torch.Tensor) -> None:
    shared, own = keys
    if shared.stop:
        total[:, shared] += part[:, : shared.stop]
    total[:, own] += part[:, shared.stop :]


def _scores(q: torch.Tensor, k: torch.Tensor, scale: float, softcap: float | None) -> torch.Tensor:
    """float32 [heads, rows, keys]. The query heads of one key head are stacked: no key is repeated."""
    scores = torch.bmm(q.reshape(k.shape[0], -1, q.shape[-1]), k.transpose(1, 2))
    scores = scores.view(q.shape[0], q.shape[1], -1).float().mul_(scale)
    return scores if softcap is None else scores.div_(softcap).tanh_().mul_(softcap)


def _softmax(scores: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    return torch.softmax(scores if mask is None else scores + mask, -1)


def _forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    bounds: Bounds | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' calling convention: query [1, heads, N, dim] -> [1, N, heads, dim]."""
    if bounds is None or query.shape[0] != 1:
        raise ConfigError("Packed attention takes one row and its bounds.")
    causal = bool(getattr(module, "is_causal", True)) if is_causal is None else is_causal
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = _Packed.apply(query[0], key[0], value[0], bounds, scale, causal, sliding_window, softcap)  # type: ignore[no-untyped-call]
    return out.transpose(0, 1).unsqueeze(0), None


AttentionInterface.register(PACKED_ATTENTION, _forward)
