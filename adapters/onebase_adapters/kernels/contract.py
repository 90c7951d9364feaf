"""The kernels' contract, and which implementation of it a served model runs on: chosen here, once.

`reference` is the definition in plain torch and runs anywhere; `cpu` is numba, `cuda` is triton. Each is a module
with the names of `Kernels`, so that nothing above this package asks which device it is on.
"""

import importlib.util
import logging
import os
import shutil
from collections.abc import Iterable
from typing import Protocol

import numpy as np
import torch

from onebase_adapters.batch import Batch, Owners
from onebase_adapters.kernels import reference
from onebase_adapters.kernels.affine_table import Vectors
from onebase_adapters.kernels.bottleneck_table import BottleneckTable
from onebase_adapters.kernels.table import LowRankTable

log = logging.getLogger(__name__)


class Kernels(Protocol):
    """What a served model needs beside the base's own products. Arrays that describe a batch are on the host."""

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


def choose_kernels(device: torch.device, dtype: torch.dtype, head_dim: int, widths: Iterable[int]) -> Kernels:
    """The fastest kernels for a model on `device` whose activations and cache are `dtype`; `widths` are the inputs
    of its linear sites."""
    if device.type == "cpu" and dtype == torch.bfloat16 and head_dim % 16 == 0 and not any(w % 4 for w in widths):
        from onebase_adapters.kernels.cpu import backend, target

        if target.TARGET != target.PLAIN:
            return backend
        log.warning("%s is served by slow kernels: it is %s", device, target.PLAIN.name)
    if device.type == "cuda" and dtype == torch.bfloat16:
        lacking = _lacking_for_triton(device)
        if lacking is None:
            from onebase_adapters.kernels.cuda import backend as cuda

            return cuda
        log.warning("%s is served by slow kernels: %s", device, lacking)
    log.info("kernels are the plain torch ones (%s, %s, head dim %d)", device, dtype, head_dim)
    return reference


def _lacking_for_triton(device: torch.device) -> str | None:
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "a GPU older than Ampere multiplies no bfloat16"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; pip install 'onebase[cuda]'"
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "triton needs a C compiler; install gcc"
    return None
