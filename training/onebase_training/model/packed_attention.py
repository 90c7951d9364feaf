"""Attention over a packed row: many examples one after another, none of which sees another.

Registered with transformers' AttentionInterface, so that every model of it trains on packed rows unchanged.
Examples of similar length are stacked and computed together; long ones go in blocks of queries that stop at the
diagonal. So few products are spent on masked pairs. Torch's own CPU kernel takes a padded batch, and takes two to
three times as long, forth and back, at the usual lengths of training examples.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface

from onebase_adapters.errors import ConfigError

PACKED_ATTENTION = "onebase_packed"

Bounds = Sequence[tuple[int, int]]
"""Start and end of each example in the row."""

_QUERIES = 256
"""Examples up to this length are stacked; longer ones are cut into blocks of so many queries."""
_ALIKE = 0.75
"""The shortest of a stack has at least this share of the longest's length (or 16 tokens)."""


@dataclass(frozen=True)
class _Block:
    """S stacked pieces of Tq queries and Tk keys, the shorter ones padded with whatever row."""

    queries: torch.Tensor
    """int64 [S, Tq], rows of the packed row"""
    keys: torch.Tensor
    """int64 [S, Tk]"""
    mask: torch.Tensor | None
    """float32 [S or 1, 1, Tq, prefix + Tk], minus infinity where a key is not seen; None where all are"""
    real: torch.Tensor | None
    """bool [S, Tq], false at padding; None without padding. Padded blocks have the same queries as keys."""


@dataclass(frozen=True)
class Packing:
    """Where examples begin and end in a row, and the blocks made of that: once a row, for all layers."""

    bounds: Bounds
    _blocks: dict[tuple[int, bool, int | None], list[_Block]] = field(default_factory=dict)

    def blocks(self, prefix: int, causal: bool, window: int | None, device: torch.device) -> list[_Block]:
        """For attention where a query sees `prefix` keys that stand before all, and those of its own example:
        up to itself if `causal`, and then less than `window` back."""
        key = (prefix, causal, window)
        if key not in self._blocks:
            self._blocks[key] = [
                block
                for stack in _stacks(self.bounds)
                for block in (
                    [_stacked(stack, prefix, causal, window, device)]
                    if len(stack) > 1 or stack[0][1] - stack[0][0] <= _QUERIES
                    else _cut(*stack[0], prefix, causal, window, device)
                )
            ]
        return self._blocks[key]


def _stacks(bounds: Bounds) -> list[list[tuple[int, int]]]:
    """Examples of similar length together."""
    stacks: list[list[tuple[int, int]]] = []
    longest = 0
    for start, end in sorted(bounds, key=lambda one: one[0] - one[1]):
        length = end - start
        if not length:
            continue
        if longest > _QUERIES or not stacks or length < min(longest * _ALIKE, longest - 16):
            stacks.append([])
            longest = length
        stacks[-1].append((start, end))
    return stacks


def _stacked(stack: Bounds, prefix: int, causal: bool, window: int | None, device: torch.device) -> _Block:
    starts = torch.tensor([start for start, _ in stack], device=device)[:, None]
    lengths = torch.tensor([end - start for start, end in stack], device=device)[:, None]
    longest = int(lengths.max())
    offsets = torch.arange(longest, device=device)[None]
    real = offsets < lengths
    rows = starts + torch.minimum(offsets, lengths - 1)
    hidden = ~real[:, None, :]
    if causal:
        hidden = hidden | _behind(offsets[0], offsets[0], window)
    padded = not bool(real.all())
    mask = _additive(hidden, prefix) if causal or padded else None
    return _Block(rows, rows, mask, real if padded else None)


def _cut(start: int, end: int, prefix: int, causal: bool, window: int | None, device: torch.device) -> list[_Block]:
    blocks = []
    for first in range(start, end, _QUERIES):
        queries = torch.arange(first, min(first + _QUERIES, end), device=device)
        low = start if window is None else max(start, first - window + 1)
        keys = torch.arange(low, int(queries[-1]) + 1 if causal else end, device=device)
        mask = _additive(_behind(queries, keys, window)[None], prefix) if causal else None
        blocks.append(_Block(queries[None], keys[None], mask, None))
    return blocks


def _behind(queries: torch.Tensor, keys: torch.Tensor, window: int | None) -> torch.Tensor:
    """bool [Tq, Tk], true where a causal query must not look."""
    ahead = keys[None, :] - queries[:, None]
    return ahead > 0 if window is None else (ahead > 0) | (ahead <= -window)


def _additive(hidden: torch.Tensor, prefix: int) -> torch.Tensor:
    mask = torch.zeros(hidden.shape, device=hidden.device).masked_fill_(hidden, -torch.inf)
    return nn.functional.pad(mask, (prefix, 0))[:, None]


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
        packing: Packing,
        scale: float,
        causal: bool,
        window: int | None,
        softcap: float | None,
    ) -> torch.Tensor:
        prefix = k.shape[1] - q.shape[1]
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        for block in packing.blocks(prefix, causal, window, q.device):
            queries, keys, values = _queries(q, block, k.shape[0]), _keys(k, block, prefix), _keys(v, block, prefix)
            p = _softmax(_scores(queries, keys, scale, softcap), block).to(q.dtype)
            _put(out, block, torch.bmm(p, values))
        ctx.save_for_backward(q, k, v, out)
        ctx.settings = packing, scale, causal, window, softcap
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, out = ctx.saved_tensors
        packing, scale, causal, window, softcap = ctx.settings
        prefix, groups = k.shape[1] - q.shape[1], k.shape[0]
        # Row sums of P * dP, by the identity of FlashAttention (Dao et al. 2022, appendix B.2).
        delta = (grad.float() * out.float()).sum(-1, keepdim=True)
        dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        # Several blocks may add to a key: in float32, so that their number does not cost precision.
        dk = torch.zeros(k.shape, dtype=torch.float32, device=k.device)
        dv = torch.zeros(v.shape, dtype=torch.float32, device=v.device)
        for block in packing.blocks(prefix, causal, window, q.device):
            queries, keys, values = _queries(q, block, groups), _keys(k, block, prefix), _keys(v, block, prefix)
            d_out = _queries(grad, block, groups)
            scores = _scores(queries, keys, scale, softcap)
            p = _softmax(scores, block)
            ds = torch.bmm(d_out, values.transpose(1, 2)).float()
            ds = ds.sub_(_queries(delta, block, groups)).mul_(p).mul_(scale)
            if softcap is not None:
                ds *= 1 - (scores / softcap) ** 2
            ds = ds.to(q.dtype)
            _put(dq, block, torch.bmm(ds, keys))
            if block.real is not None:  # rows of padding repeat a real one, and would count it again
                padding = ~block.real[None, :, None, :, None]
                ds = _by_head(ds, block).masked_fill(padding, 0).view_as(ds)
                p = _by_head(p, block).masked_fill(padding, 0).view_as(p)
            _add(dk, block, prefix, torch.bmm(ds.transpose(1, 2), queries))
            _add(dv, block, prefix, torch.bmm(p.to(q.dtype).transpose(1, 2), d_out))
        return dq, dk.to(k.dtype), dv.to(v.dtype), None, None, None, None, None


def _queries(x: torch.Tensor, block: _Block, groups: int) -> torch.Tensor:
    """[heads, N, dim] -> [groups * S, heads / groups * Tq, dim]: the query heads of one key head are stacked, so
    that no key is repeated."""
    taken = x.view(groups, -1, *x.shape[1:])[:, :, block.queries]
    return taken.transpose(1, 2).reshape(groups * block.queries.shape[0], -1, x.shape[-1])


def _keys(x: torch.Tensor, block: _Block, prefix: int) -> torch.Tensor:
    """[kv_heads, prefix + N, dim] -> [kv_heads * S, prefix + Tk, dim]."""
    own = x[:, prefix + block.keys]
    if prefix:
        shared = x[:, None, :prefix].expand(-1, own.shape[1], -1, -1)
        own = torch.cat([shared, own], dim=2)
    return own.reshape(-1, own.shape[2], own.shape[3])


def _by_head(x: torch.Tensor, block: _Block) -> torch.Tensor:
    """[groups * S, heads / groups * Tq, d] -> [groups, S, heads / groups, Tq, d]."""
    pieces, length = block.queries.shape
    return x.view(x.shape[0] // pieces, pieces, -1, length, x.shape[-1])


def _put(total: torch.Tensor, block: _Block, part: torch.Tensor) -> None:
    """The inverse of `_queries`: each row of `total` is written by one block."""
    rows = _by_head(part, block).transpose(1, 2)  # [groups, heads / groups, S, Tq, dim]
    rows = rows.reshape(total.shape[0], *block.queries.shape, total.shape[-1])
    if block.real is None:
        total[:, block.queries] = rows
    else:
        total[:, block.queries[block.real]] = rows[:, block.real]


def _add(total: torch.Tensor, block: _Block, prefix: int, part: torch.Tensor) -> None:
    """The inverse of `_keys`, summed. Padding's part is zero."""
    pieces, length = block.keys.shape
    rows = part.view(total.shape[0], pieces, prefix + length, -1).to(total.dtype)
    if prefix:
        total[:, :prefix] += rows[:, :, :prefix].sum(1)
        rows = rows[:, :, prefix:]
    total.index_add_(1, prefix + block.keys.flatten(), rows.reshape(total.shape[0], pieces * length, -1))


def _scores(queries: torch.Tensor, keys: torch.Tensor, scale: float, softcap: float | None) -> torch.Tensor:
    scores = torch.bmm(queries, keys.transpose(1, 2)).float().mul_(scale)
    return scores if softcap is None else scores.div_(softcap).tanh_().mul_(softcap)


def _softmax(scores: torch.Tensor, block: _Block) -> torch.Tensor:
    """float32, as `scores`."""
    if block.mask is None:
        return torch.softmax(scores, -1)
    return torch.softmax(_by_head(scores, block) + block.mask, -1).view_as(scores)


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
    packing: Packing | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' calling convention: query [1, heads, N, dim] -> [1, N, heads, dim]."""
    if packing is None or query.shape[0] != 1:
        raise ConfigError("Packed attention takes one row and its packing.")
    causal = bool(getattr(module, "is_causal", True)) if is_causal is None else is_causal
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    kind = query.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query.dtype
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    out = _Packed.apply(query[0], key[0], value[0], packing, scale, causal, sliding_window, softcap)  # type: ignore[no-untyped-call]
    return out.transpose(0, 1).unsqueeze(0), None


AttentionInterface.register(PACKED_ATTENTION, _forward)
