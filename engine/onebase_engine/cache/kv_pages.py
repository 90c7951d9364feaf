"""The memory of the paged cache: keys and values of every layer, in blocks."""

from typing import Any

import numpy as np
import torch

from onebase_engine.base.describe import cache_shape
from onebase_engine.kernels.adapter_interface import AdapterKernels
from onebase_engine.kernels.batch import BLOCK, Batch


class PagedKV:
    """Keys and values of all layers in blocks of 16 tokens; which block is whose is the engine's business."""

    def __init__(
        self,
        config: Any,
        blocks: int,
        kernels: AdapterKernels,
        device: torch.device,
        dtype: torch.dtype = torch.bfloat16,
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

    def write(self, layer: int, k: torch.Tensor, v: torch.Tensor, batch: Batch) -> None:
        """k, v [T, kv_heads, dim], the last two dimensions contiguous."""
        self._kernels.write_kv(k, v, self.k[layer], self.v[layer], batch)

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
        batch: Batch,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
    ) -> torch.Tensor:
        """q [T, heads, dim] (last two dimensions contiguous) -> [T, heads, dim]; see `reference.attend`."""
        return self._kernels.attend(q, self.k[layer], self.v[layer], batch, scale, window, softcap)
