"""Resident low-rank weights as the kernels read them: each adapter in memory of its own, and where a matrix lies.

Each slot has its own ranks: nothing is padded to the largest.
"""

import mmap
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from onebase_adapters.base.shape import Site
from onebase_adapters.primitives import LowRank

_HUGE_PAGE = 2**21
_ALIGN = 64
"""Elements: matrices begin on cache lines (and on what a GPU loads at once)."""
_TAIL = 64
"""Elements that a kernel may read past a matrix' end."""


class Arena:
    """One adapter's weights in the order in which a step reads them. On a CPU on huge pages where the system has
    them: a batch of many adapters is bound by how fast their weights stream from memory."""

    def __init__(self, elements: int, device: torch.device) -> None:
        self.bytes = max(2 * elements, mmap.PAGESIZE)
        self._used = 0
        if device.type != "cpu":
            self._memory = torch.empty(self.bytes // 2, dtype=torch.bfloat16, device=device)
            return
        # Rounded up so that the last page can be a huge one too.
        pages = mmap.mmap(-1, -(-self.bytes // _HUGE_PAGE) * _HUGE_PAGE)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            pages.madvise(mmap.MADV_HUGEPAGE)
        self._memory = torch.frombuffer(pages, dtype=torch.bfloat16)

    @staticmethod
    def size(elements: int) -> int:
        """What a matrix of so many elements takes."""
        return -(-(elements + _TAIL) // _ALIGN) * _ALIGN

    def hold(self, matrix: torch.Tensor) -> torch.Tensor:
        """Keep a matrix in bfloat16, contiguous, followed by the tail that a kernel may read past its end."""
        target = self._memory[self._used : self._used + matrix.numel()].view(matrix.shape)
        target.copy_(matrix)
        self._used += self.size(matrix.numel())
        return target


def group_columns(matrix: torch.Tensor, width: int) -> torch.Tensor:
    """[rows, columns] as one row: `width` columns of all rows, then the next ones; how many the last group has is
    rounded up to a multiple of 16."""
    groups = [
        torch.nn.functional.pad(part, (0, _padded(part.shape[1]) - part.shape[1]))
        for part in torch.split(matrix, width, 1)
    ]
    return torch.cat([group.reshape(-1) for group in groups])


def _padded(columns: int) -> int:
    return -(-columns // 16) * 16


class LowRankTable:
    """Resident low-rank weights of a group of sites that read the same input, by slot.

    B is kept transposed, [rank, out], or that in groups of columns; the sites' A side by side, [sum of ranks, in],
    or transposed.
    """

    def __init__(self, sites: Sequence[Site], slots: int, *, transposed_a: bool, grouped_b: int) -> None:
        """`transposed_a`, `grouped_b`: as the kernels have them."""
        self.sites = tuple(sites)
        self.in_features = sites[0].in_features
        self.columns = np.cumsum([0] + [site.out_features for site in sites]).astype(np.int64)
        """[sites + 1]: the sites' column ranges in the group's output."""
        self.updates: dict[int, Sequence[LowRank | None]] = {}
        """By slot: each site's update, views of the arena (None: untouched). Not kept where B is grouped."""
        self.a = np.zeros(slots, np.int64)
        """By slot: address of A."""
        self.b = np.zeros((len(sites), slots), np.int64)
        """Address of each B."""
        self.ranks = np.zeros((len(sites), slots), np.int64)
        """0: untouched."""
        self.scales = np.zeros((len(sites), slots), np.float32)
        self.widest = 0
        """The largest sum of a slot's ranks."""
        self._rows: torch.Tensor | None = None
        self._transposed_a = transposed_a
        self._grouped_b = grouped_b
        self._arenas: dict[int, Arena] = {}
        """By slot: what the addresses point into."""

    def size(self, updates: Mapping[str, LowRank]) -> int:
        """Elements that `put` takes from an arena for these updates."""
        mine = [updates[site.name] for site in self.sites if site.name in updates]
        joined = Arena.size(sum(update.a.numel() for update in mine)) if mine else 0
        if self._grouped_b:
            return joined + sum(Arena.size(update.rank * _padded(update.b.shape[0])) for update in mine)
        return joined + sum(Arena.size(update.b.numel()) for update in mine)

    def put(self, slot: int, updates: Mapping[str, LowRank], arena: Arena) -> None:
        """Make `updates` (by site name) the slot's weights; sites without one stay untouched."""
        chosen = [updates.get(site.name) for site in self.sites]
        if not any(chosen):
            return
        joined = torch.cat([update.a for update in chosen if update is not None])
        a = arena.hold(joined.t()).t() if self._transposed_a else arena.hold(joined)
        self.a[slot] = a.data_ptr()
        held: list[LowRank | None] = []
        first = 0
        for index, update in enumerate(chosen):
            if update is None:
                held.append(None)
                continue
            b = arena.hold(group_columns(update.b.t(), self._grouped_b) if self._grouped_b else update.b.t())
            if not self._grouped_b:
                held.append(LowRank(update.site, a[first : first + update.rank], b.t(), update.scale))
            first += update.rank
            self.b[index, slot] = b.data_ptr()
            self.ranks[index, slot] = update.rank
            self.scales[index, slot] = update.scale
        self._arenas[slot] = arena
        if not self._grouped_b:
            self.updates[slot] = held
        self._changed()

    def clear(self, slot: int) -> None:
        """Forget the slot's weights."""
        self.ranks[:, slot] = 0
        self.updates.pop(slot, None)
        self._arenas.pop(slot, None)
        self._changed()

    def _changed(self) -> None:
        self.widest = int(self.ranks.sum(0).max())
        self._rows = None

    def rows_on(self, device: torch.device) -> torch.Tensor:
        """All of this on `device`, [slots, 2 + 4 * sites] int64: for each slot the address of A, those of each B,
        the ranks, the bits of the scales, and the columns."""
        if self._rows is None:
            bits = self.scales.view(np.int32)
            columns = np.repeat(self.columns[:, None], len(self.a), axis=1)
            rows = np.concatenate([self.a[None], self.b, self.ranks, bits, columns])
            self._rows = torch.from_numpy(rows.T.copy()).to(device)
        return self._rows

    @property
    def numbers(self) -> list[int]:
        """Sites, slots; addresses of columns, a, b, ranks and scales, which stay where they are."""
        arrays = (self.columns, self.a, self.b, self.ranks, self.scales)
        return [len(self.sites), len(self.a), *(array.ctypes.data for array in arrays)]

    def touches(self, slots: np.ndarray) -> bool:
        """Whether any of these slots has an adapter that changes these sites."""
        return bool(self.ranks[:, slots].any())
