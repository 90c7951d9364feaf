"""The GPU kernels under the names of `AdapterKernels`: a batch's arrays go to the device once for each step."""

import numpy as np
import torch

from onebase_engine.kernels.batch import Batch, Owners
from onebase_engine.kernels.cuda import attention, elementwise, lowrank
from onebase_engine.kernels.tables import BottleneckTable, LowRankTable, Vectors
from onebase_engine.kernels.tiles import query_tiles

TILE_ROWS = lowrank.TILE
PAIRED_COLUMNS = 0
TRANSPOSED_DOWN = False


def attention_items(query_start: np.ndarray, positions: np.ndarray, kv_heads: int) -> np.ndarray:
    """As `query_tiles`."""
    return query_tiles(query_start)


def add_low_rank(x: torch.Tensor, y: torch.Tensor, owners: Owners, table: LowRankTable) -> None:
    """As `reference.add_low_rank`."""
    if table.widest:  # not only for these rows' adapters: a captured step must do for any
        lowrank.add_low_rank(x, y, owners.tiles_on(x.device), table)


def affine_rows(y: torch.Tensor, owners: Owners, scales: Vectors, shifts: Vectors) -> None:
    """As `reference.affine_rows`."""
    elementwise.affine_rows(y, owners.slots_on(y.device), scales, shifts)


def add_bottleneck(
    x: torch.Tensor, y: torch.Tensor, owners: Owners, table: BottleneckTable, *, parallel: bool
) -> None:
    """As `reference.add_bottleneck`."""
    lowrank.add_bottleneck(x, y, owners.tiles_on(y.device), table, parallel=parallel)


def write_kv(k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, batch: Batch) -> None:
    """As `reference.write_kv`."""
    attention.write_kv(k, v, k_cache, v_cache, batch.on_device)


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
    return attention.attend(q, k_cache, v_cache, batch.on_device, scale, window, softcap)
