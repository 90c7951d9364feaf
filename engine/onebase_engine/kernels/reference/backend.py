"""The kernels' definitions in plain torch: what the fast ones are tested against, and what runs where none is."""

import logging
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812

from onebase_adapters.primitives.instruction_set import Activation
from onebase_engine.kernels.batch import BLOCK, Batch, Owners
from onebase_engine.kernels.tables import BottleneckTable, LowRankTable, Vectors
from onebase_engine.kernels.tiles import query_tiles

log = logging.getLogger(__name__)

TILE_ROWS = 16
PAIRED_COLUMNS = 0
TRANSPOSED_DOWN = False
CAPTURED = False


def fuse(model: Any, *_: object) -> None:
    """The definition is transformers' own layers."""
    log.info("%s keeps transformers' own layers: its kernels are the plain ones", type(model).__name__)


def screen(head: Any) -> None:
    """The definition is all logits."""


def group(modules: Sequence[Any]) -> Callable[[torch.Tensor, Sequence[int]], torch.Tensor]:
    """One module after another."""

    def product(rows: torch.Tensor, bounds: Sequence[int]) -> torch.Tensor:
        own = zip(modules, pairwise(bounds), strict=True)
        return torch.cat([module(rows[first:last]) for module, (first, last) in own if last > first])

    return product


def attention_items(query_start: np.ndarray, visible: np.ndarray, kv_heads: int) -> np.ndarray:
    """As `query_tiles`."""
    return query_tiles(query_start)


def _rows_of(slot: int, owners: Owners, device: torch.device) -> torch.Tensor:
    # Found on the host: asking a device for them would wait for all that it has to do.
    return torch.from_numpy(np.flatnonzero(owners.slots == slot)).to(device)


def add_low_rank(x: torch.Tensor, y: torch.Tensor, owners: Owners, table: LowRankTable) -> None:
    """y[t, columns of site s] += scale * B (A x[t]) with the weights of row t's slot, for each site s of the table.

    x [T, in], y [T, all columns]. A x is rounded to x's dtype, as in PEFT.
    """
    for slot, updates in table.updates.items():
        rows = _rows_of(slot, owners, x.device)
        if not len(rows):
            continue
        inputs = x[rows].float()
        for site, update in enumerate(updates):
            if update is not None:
                between = (inputs @ update.a.float().t()).to(x.dtype).float()
                delta = between @ update.b.float().t() * update.scale
                first, last = int(table.columns[site]), int(table.columns[site + 1])
                y[rows, first:last] = (y[rows, first:last].float() + delta).to(y.dtype)


def affine_rows(y: torch.Tensor, owners: Owners, scales: Vectors, shifts: Vectors) -> None:
    """y[t] = y[t] * scale + shift, in place, with the vectors [width] of row t's slot, where it has them."""
    for slot in scales.by_slot.keys() | shifts.by_slot.keys():
        rows = _rows_of(slot, owners, y.device)
        if slot in scales.by_slot:
            y[rows] = (y[rows].float() * scales.by_slot[slot]).to(y.dtype)
        if slot in shifts.by_slot:
            y[rows] = (y[rows].float() + shifts.by_slot[slot]).to(y.dtype)


_ACTIVATIONS: Mapping[Activation, Callable[[torch.Tensor], torch.Tensor]] = {
    "identity": lambda x: x,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "tanh": torch.tanh,
}


def add_bottleneck(
    x: torch.Tensor, y: torch.Tensor, owners: Owners, table: BottleneckTable, *, parallel: bool
) -> None:
    """y[t] += scale * up(activation(down(s[t]))), biases included, with the weights of row t's slot.

    Of the table's sequential parts with s = y, or of its parallel ones with s = x. x, y [T, hidden].
    """
    source = x if parallel else y
    for slot, part in table.parts.items():
        rows = _rows_of(slot, owners, y.device)
        if len(rows) and part.parallel == parallel:
            hidden = F.linear(source[rows].float(), part.down.float(), part.down_bias)
            delta = F.linear(_ACTIVATIONS[part.activation](hidden), part.up.float(), part.up_bias)
            y[rows] = (y[rows].float() + part.scale * delta).to(y.dtype)


def write_kv(k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, batch: Batch) -> None:
    """k, v [T, kv_heads, dim] into k_cache [blocks, kv_heads, dim, 16], v_cache [blocks, kv_heads, 16, dim]."""
    slots = torch.as_tensor(batch.cache_slots, device=k.device)
    blocks, offsets = slots // BLOCK, slots % BLOCK
    k_cache[blocks, :, :, offsets] = k
    v_cache[blocks, :, offsets] = v


def attend(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    batch: Batch,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """softmax(scale * q K) V for each token over its sequence's keys up to the last that it may see.

    q [T, heads, dim] -> [T, heads, dim]; `window`: only the last so many positions; `softcap` c: scores
    become c * tanh(score / c) (Gemma 2).
    """
    out = torch.empty_like(q)
    kv_heads, dim = k_cache.shape[1], k_cache.shape[2]
    group = q.shape[1] // kv_heads
    positions = torch.as_tensor(batch.positions, device=q.device)
    visible = torch.as_tensor(batch.visible, device=q.device)
    for sequence in range(len(batch.query_start) - 1):
        first, last = int(batch.query_start[sequence]), int(batch.query_start[sequence + 1])
        at, end = positions[first:last], visible[first:last]
        length = int(end[-1]) + 1
        blocks = torch.as_tensor(batch.tables[sequence, : (length + BLOCK - 1) // BLOCK], device=q.device).long()
        keys = k_cache[blocks].permute(1, 2, 0, 3).reshape(kv_heads, dim, -1)[..., :length].float()
        values = v_cache[blocks].transpose(0, 1).reshape(kv_heads, -1, dim)[:, :length].float()
        queries = q[first:last].float().view(last - first, kv_heads, group, dim)
        scores = torch.einsum("tkgd,kds->kgts", queries, keys) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        place = torch.arange(length, device=q.device)
        seen = place[None] <= end[:, None]
        if window is not None:
            seen &= place[None] > at[:, None] - window
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        out[first:last] = torch.einsum("kgts,ksd->tkgd", weights, values).flatten(1, 2).to(q.dtype)
    return out
