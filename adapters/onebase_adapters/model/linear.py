"""Linear sites with per-token adapters: the base's product first, then what each token's slot adds to it."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from onebase_adapters.base.shape import Site
from onebase_adapters.batch import Context
from onebase_adapters.kernels import reference
from onebase_adapters.kernels.cpu import lowrank
from onebase_adapters.primitives import LowRank


class LowRankTable:
    """Resident low-rank weights of a group of sites that read the same input, by slot.

    Weights are kept transposed in bfloat16, each slot with its own ranks; see `kernels.cpu.lowrank`.
    """

    def __init__(self, sites: Sequence[Site], slots: int, device: torch.device) -> None:
        self.sites = tuple(sites)
        self.in_features = sites[0].in_features
        self.columns = np.cumsum([0] + [site.out_features for site in sites]).astype(np.int64)
        self._fast = device.type == "cpu" and self.in_features % 4 == 0
        self._device = device
        self._weights: dict[int, Sequence[LowRank | None]] = {}
        self._held: dict[int, list[torch.Tensor]] = {}
        self._a = np.zeros(slots, np.int64)
        self._b = np.zeros((len(sites), slots), np.int64)
        self._ranks = np.zeros((len(sites), slots), np.int64)
        self._scales = np.zeros((len(sites), slots), np.float32)

    def put(self, slot: int, updates: dict[str, LowRank]) -> None:
        """Make `updates` (by site name) the slot's weights; sites without one stay untouched."""
        chosen = [updates.get(site.name) for site in self.sites]
        if not any(chosen):
            return
        if not self._fast:
            self._weights[slot] = [
                update and LowRank(update.site, update.a.to(self._device), update.b.to(self._device), update.scale)
                for update in chosen
            ]
            return
        present = [update for update in chosen if update is not None]
        held = [_packed(torch.cat([update.a for update in present]))]
        self._a[slot] = held[0].data_ptr()
        for index, update in enumerate(chosen):
            if update is not None:
                held.append(_packed(update.b))
                self._b[index, slot] = held[-1].data_ptr()
                self._ranks[index, slot] = update.rank
                self._scales[index, slot] = update.scale
        self._held[slot] = held

    def clear(self, slot: int) -> None:
        """Forget the slot's weights."""
        self._ranks[:, slot] = 0
        self._held.pop(slot, None)
        self._weights.pop(slot, None)

    def bytes(self, slot: int) -> int:
        """Memory of the slot's weights."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self._held.get(slot, ()))

    def add(self, x: torch.Tensor, y: torch.Tensor, context: Context) -> None:
        """y [T, sum of out_features] += the updates of each token's slot for its input x [T, in]."""
        if self._fast and x.dtype == torch.bfloat16:
            self.add_at(x.data_ptr(), y.data_ptr(), context)
        else:
            reference.add_low_rank(x, y, context.batch, self.columns.tolist(), self._weights)

    def add_at(self, x: int, y: int, context: Context) -> None:
        """The same by address, contiguous bfloat16 on a CPU."""
        lowrank.add_low_rank(
            x, self.in_features, y, int(self.columns[-1]), self.in_features, self.columns, context.batch.tiles,
            self._a, self._b, self._ranks, self._scales,
        )  # fmt: skip


def _packed(matrix: torch.Tensor) -> torch.Tensor:
    """[out, in] transposed, flat, bfloat16, with the tail that the kernel may read past the end."""
    packed = torch.zeros(matrix.numel() + lowrank.TAIL, dtype=torch.bfloat16)
    packed[: matrix.numel()] = matrix.t().reshape(-1)
    return packed


class AdapterLinear(nn.Module):
    """A linear module of the base in its place, unchanged, followed by its table's updates."""

    def __init__(self, inner: nn.Module, table: LowRankTable, context: Context) -> None:
        super().__init__()
        self.inner = inner
        self.table = table
        self.context = context

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.inner(x)
        if len(self.context.batch.tiles):
            width = x.shape[-1]
            self.table.add(x.reshape(-1, width).contiguous(), y.view(-1, y.shape[-1]), self.context)
        return y
