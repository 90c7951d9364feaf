"""What a model's layers call for their adapters, their cache and attention, and what they keep in memory for it."""

from typing import Protocol

import numpy as np
import torch

from onebase_adapters.primitives.lowered_adapter import LoweredAdapter
from onebase_engine.kernels.batch import Batch, Owners
from onebase_engine.kernels.tables import BottleneckTable, LowRankTable, Vectors


class AdapterKernels(Protocol):
    """What layers need beside the base's own products. Arrays that describe a batch are on the host."""

    @property
    def TILE_ROWS(self) -> int:  # noqa: N802
        """Rows of one slot in a tile of `low_rank_tiles`, at most."""
        ...

    @property
    def PAIRED_COLUMNS(self) -> int:  # noqa: N802
        """How many columns of the transposed B a low-rank table keeps together in pairs of rows, as it then keeps
        all of the transposed A's; 0: A and the transposed B lie row by row."""
        ...

    @property
    def TRANSPOSED_DOWN(self) -> bool:  # noqa: N802
        """Whether a bottleneck's matrix to the bottleneck is kept as [hidden, rank]."""
        ...

    def attention_items(self, query_start: np.ndarray, visible: np.ndarray, kv_heads: int) -> np.ndarray:
        """Cut a batch into work items [n, ...] int32 as `attend` reads them; arguments as in `Batch`."""
        ...

    def add_low_rank(self, x: torch.Tensor, y: torch.Tensor, owners: Owners, table: LowRankTable) -> None:
        """See `reference.add_low_rank`. x and y contiguous."""
        ...

    def affine_rows(self, y: torch.Tensor, owners: Owners, scales: Vectors, shifts: Vectors) -> None:
        """See `reference.affine_rows`. y contiguous."""
        ...

    def add_bottleneck(
        self, x: torch.Tensor, y: torch.Tensor, owners: Owners, table: BottleneckTable, *, parallel: bool
    ) -> None:
        """See `reference.add_bottleneck`. x and y contiguous."""
        ...

    def write_kv(
        self, k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, batch: Batch
    ) -> None:
        """See `reference.write_kv`. The last two dimensions of k and v contiguous."""
        ...

    def attend(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        batch: Batch,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
    ) -> torch.Tensor:
        """See `reference.attend`. The last two dimensions of q contiguous."""
        ...


class Table(Protocol):
    """What keeps a part of each resident adapter."""

    def put(self, slot: int, adapter: LoweredAdapter) -> None:
        """Make the adapter's part the slot's, if it has one."""
        ...

    def clear(self, slot: int) -> None:
        """Forget the slot's part."""
        ...


class KeyValuePages(Protocol):
    """The paged cache as fused decoders read and write it."""

    k: list[torch.Tensor]
    """Keys, one tensor [blocks, kv_heads, dim, BLOCK] for each layer."""
    v: list[torch.Tensor]
    """Values, one tensor [blocks, kv_heads, BLOCK, dim] for each layer."""
    kv_heads: int
    dim: int
