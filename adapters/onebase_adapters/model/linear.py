"""Linear sites with per-token adapters: the base's product first, then what each token's slot adds to it."""

import mmap
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import nn

from onebase_adapters.base.shape import Site
from onebase_adapters.batch import Context, Owners
from onebase_adapters.kernels import reference
from onebase_adapters.kernels.cpu import lowrank
from onebase_adapters.primitives import LowRank

_HUGE_PAGE = 2**21


class Arena:
    """One adapter's packed weights, in the order in which a step reads them, on huge pages where the system has
    them: a batch of many adapters is bound by how fast their weights stream from memory."""

    def __init__(self, elements: int) -> None:
        self.bytes = max(2 * elements, mmap.PAGESIZE)
        # Rounded up so that the last page can be a huge one too.
        pages = mmap.mmap(-1, -(-self.bytes // _HUGE_PAGE) * _HUGE_PAGE)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            pages.madvise(mmap.MADV_HUGEPAGE)
        self._memory = torch.frombuffer(pages, dtype=torch.bfloat16)
        self._used = 0

    def hold(self, matrix: torch.Tensor) -> int:
        """Keep [out, in] transposed, in bfloat16, followed by the tail that the kernel may read past the end;
        returns its address."""
        target = self._memory[self._used : self._used + matrix.numel()]
        target.view(matrix.shape[1], matrix.shape[0]).copy_(matrix.t())
        self._used += matrix.numel() + lowrank.TAIL
        return target.data_ptr()


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
        self._a = np.zeros(slots, np.int64)
        self._b = np.zeros((len(sites), slots), np.int64)
        self._ranks = np.zeros((len(sites), slots), np.int64)
        self._scales = np.zeros((len(sites), slots), np.float32)

    def size(self, updates: Mapping[str, LowRank]) -> int:
        """Elements that `put` takes from an arena for these updates."""
        mine = [updates[site.name] for site in self.sites if site.name in updates]
        return sum(update.parameters for update in mine) + (len(mine) + 1) * lowrank.TAIL

    def put(self, slot: int, updates: Mapping[str, LowRank], arena: Arena) -> None:
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
        self._a[slot] = arena.hold(torch.cat([update.a for update in present]))
        for index, update in enumerate(chosen):
            if update is not None:
                self._b[index, slot] = arena.hold(update.b)
                self._ranks[index, slot] = update.rank
                self._scales[index, slot] = update.scale

    def clear(self, slot: int) -> None:
        """Forget the slot's weights."""
        self._ranks[:, slot] = 0
        self._weights.pop(slot, None)

    def touches(self, owners: Owners) -> bool:
        """Whether any of the rows has an adapter that changes these sites."""
        if not len(owners.tiles):
            return False
        return bool(self._ranks[:, owners.slots].any()) or any(slot in self._weights for slot in owners.slots)

    def add(self, x: torch.Tensor, y: torch.Tensor, owners: Owners) -> None:
        """y [rows, sum of out_features] += the updates of each row's slot for its input x [rows, in]."""
        if self._fast and x.dtype == torch.bfloat16:
            self.add_at(x.data_ptr(), y.data_ptr(), owners)
        else:
            reference.add_low_rank(x, y, owners, self.columns.tolist(), self._weights)

    def add_at(self, x: int, y: int, owners: Owners) -> None:
        """The same by address, contiguous bfloat16 on a CPU."""
        lowrank.add_low_rank(
            x, self.in_features, y, int(self.columns[-1]), self.in_features, self.columns, owners.tiles,
            self._a, self._b, self._ranks, self._scales,
        )  # fmt: skip


class AdapterLinear(nn.Module):
    """A linear module of the base in its place, unchanged, followed by its table's updates."""

    def __init__(self, inner: nn.Module, table: LowRankTable, context: Context, *, head: bool) -> None:
        """`head`: it is the LM head, which sees only the rows to sample from."""
        super().__init__()
        self.inner = inner
        self.table = table
        self.context = context
        self.head = head

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.inner(x)
        batch = self.context.batch
        owners = batch.head_owners if self.head else batch.owners
        if len(owners.tiles):
            self.table.add(x.reshape(-1, x.shape[-1]).contiguous(), y.view(-1, y.shape[-1]), owners)
        return y
