"""The CPU kernels under the names of `AdapterKernels`: tensors in, addresses to numba. bfloat16 only."""

import numpy as np
import torch

from onebase_engine.kernels.batch import Batch, Owners
from onebase_engine.kernels.cpu import attention, bottleneck, elementwise, lowrank
from onebase_engine.kernels.reference import backend as reference
from onebase_engine.kernels.tables import BottleneckTable, LowRankTable, Vectors

TILE_ROWS = lowrank.TILE
PAIRED_COLUMNS = lowrank.GROUP
TRANSPOSED_DOWN = True


def attention_items(query_start: np.ndarray, visible: np.ndarray, kv_heads: int) -> np.ndarray:
    """[n, 4] int32: sequence, first token, tokens, kv head; an even share for each of torch's threads."""
    return attention.attention_items(query_start, visible, kv_heads, torch.get_num_threads())


def add_low_rank(x: torch.Tensor, y: torch.Tensor, owners: Owners, table: LowRankTable) -> None:
    """As `reference.add_low_rank`."""
    if not table.touches(owners.slots):
        return  # a parallel region costs more than looking
    if x.dtype != torch.bfloat16 or y.dtype != torch.bfloat16:
        change = torch.zeros(y.shape, dtype=torch.bfloat16)
        add_low_rank(x.bfloat16(), change, owners, table)
        y += change
        return
    lowrank.add_low_rank(
        x.data_ptr(), table.in_features, y.data_ptr(), int(table.columns[-1]), table.in_features, table.columns,
        owners.tiles, table.a, table.b, table.ranks, table.scales,
    )  # fmt: skip


def affine_rows(y: torch.Tensor, owners: Owners, scales: Vectors, shifts: Vectors) -> None:
    """As `reference.affine_rows`."""
    if y.dtype != torch.bfloat16:
        reference.affine_rows(y, owners, scales, shifts)
        return
    elementwise.affine_rows(y.data_ptr(), y.shape[-1], owners.slots, scales.addresses, shifts.addresses)


def add_bottleneck(
    x: torch.Tensor, y: torch.Tensor, owners: Owners, table: BottleneckTable, *, parallel: bool
) -> None:
    """As `reference.add_bottleneck`."""
    if y.dtype != torch.bfloat16:
        reference.add_bottleneck(x, y, owners, table, parallel=parallel)
        return
    ranks = np.where(table.parallel == parallel, table.ranks, 0)
    bottleneck.add_bottleneck(
        (x if parallel else y).data_ptr(), y.data_ptr(), y.shape[-1], owners.tiles, table.down, table.down_bias,
        table.up, table.up_bias, ranks, table.activations, table.scales,
    )  # fmt: skip


def write_kv(k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, batch: Batch) -> None:
    """As `reference.write_kv`."""
    attention.write_kv(
        k.data_ptr(), k.stride(0), v.data_ptr(), v.stride(0), k_cache.data_ptr(), v_cache.data_ptr(),
        k_cache.shape[1], k_cache.shape[2], batch.cache_slots,
    )  # fmt: skip


def attend(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    batch: Batch,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """As `reference.attend`."""
    if softcap is not None:
        return reference.attend(q, k_cache, v_cache, batch, scale, window, softcap)
    kv_heads, dim = k_cache.shape[1], k_cache.shape[2]
    out = torch.empty(q.shape, dtype=q.dtype)
    attention.attend(
        q.data_ptr(), q.stride(0), out.data_ptr(), out.stride(0), k_cache.data_ptr(), v_cache.data_ptr(),
        kv_heads, q.shape[1] // kv_heads, dim, scale, window or attention.NO_WINDOW, batch.items, batch.positions,
        batch.visible, batch.tables,
    )  # fmt: skip
    return out
