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
_LANES = 16
"""Columns that a kernel takes at once, where it takes them in pairs of rows."""


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


def in_pairs(matrix: torch.Tensor, width: int, multiple: int = 1) -> torch.Tensor:
    """[rows, columns] as one row: `width` columns of all rows, then the next ones. Of each group [pairs, columns,
    2]: two rows interleaved, an odd one with zeros. The last group's columns are rounded up to a multiple of
    `multiple`."""
    groups = []
    for part in torch.split(matrix, width, 1):
        rows, columns = part.shape
        padded = torch.nn.functional.pad(part, (0, -columns % multiple, 0, rows % 2))
        groups.append(padded.view(-(-rows // 2), 2, -1).transpose(1, 2).reshape(-1))
    return torch.cat(groups)


def _rounded(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


class LowRankTable:
    """Resident low-rank weights of a group of sites that read the same input, by slot.

    B is kept transposed, [rank, out], the sites' A side by side, [sum of ranks, in]; or B and A's transpose
    `in_pairs`, B in groups of `paired_columns`.
    """

    def __init__(self, sites: Sequence[Site], slots: int, *, paired_columns: int) -> None:
        """`paired_columns`: as the kernels have it."""
        self.sites = tuple(sites)
        self.in_features = sites[0].in_features
        self.columns = np.cumsum([0] + [site.out_features for site in sites]).astype(np.int64)
        """[sites + 1]: the sites' column ranges in the group's output."""
        self.updates: dict[int, Sequence[LowRank | None]] = {}
        """By slot: each site's update, views of the arena (None: untouched). Not kept in pairs."""
        self.a = np.zeros(slots, np.int64)
        """By slot: address of A."""
        self.b = np.zeros((len(sites), slots), np.int64)
        """Address of each B."""
        self.ranks = np.zeros((len(sites), slots), np.int64)
        """0: untouched."""
        self.scales = np.zeros((len(sites), slots), np.float32)
        self.spans = np.zeros(slots, np.int64)
        """Bytes from a slot's A to the end of its last B, which lie in a row."""
        self.widest = 0
        """The largest sum of a slot's ranks."""
        self._rows: torch.Tensor | None = None
        self._paired_columns = paired_columns
        self._arenas: dict[int, Arena] = {}
        """By slot: what the addresses point into."""

    def size(self, updates: Mapping[str, LowRank]) -> int:
        """Elements that `put` takes from an arena for these updates."""
        mine = [updates[site.name] for site in self.sites if site.name in updates]
        if not mine:
            return 0
        if not self._paired_columns:
            joined = Arena.size(sum(update.a.numel() for update in mine))
            return joined + sum(Arena.size(update.b.numel()) for update in mine)
        joined = Arena.size(_rounded(self.in_features, 2) * sum(update.rank for update in mine))
        sizes = [_rounded(update.rank, 2) * _rounded(update.b.shape[0], _LANES) for update in mine]
        return joined + sum(Arena.size(size) for size in sizes)

    def put(self, slot: int, updates: Mapping[str, LowRank], arena: Arena) -> None:
        """Make `updates` (by site name) the slot's weights; sites without one stay untouched."""
        chosen = [updates.get(site.name) for site in self.sites]
        if not any(chosen):
            return
        joined = torch.cat([update.a for update in chosen if update is not None])
        a = arena.hold(in_pairs(joined.t(), len(joined)) if self._paired_columns else joined)
        self.a[slot] = a.data_ptr()
        held: list[LowRank | None] = []
        first = 0
        for index, update in enumerate(chosen):
            if update is None:
                held.append(None)
                continue
            transposed = update.b.t()
            if self._paired_columns:
                b = arena.hold(in_pairs(transposed, self._paired_columns, _LANES))
            else:
                b = arena.hold(transposed)
                held.append(LowRank(update.site, a[first : first + update.rank], b.t(), update.scale))
            first += update.rank
            self.b[index, slot] = b.data_ptr()
            self.ranks[index, slot] = update.rank
            self.scales[index, slot] = update.scale
        self.spans[slot] = b.data_ptr() + b.nbytes - a.data_ptr()
        self._arenas[slot] = arena
        if not self._paired_columns:
            self.updates[slot] = held
        self._changed()

    def clear(self, slot: int) -> None:
        """Forget the slot's weights."""
        self.ranks[:, slot] = 0
        self.spans[slot] = 0
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
        """Sites, slots; addresses of columns, a, b, ranks, scales and spans, which stay where they are."""
        arrays = (self.columns, self.a, self.b, self.ranks, self.scales, self.spans)
        return [len(self.sites), len(self.a), *(array.ctypes.data for array in arrays)]

    def touches(self, slots: np.ndarray) -> bool:
        """Whether any of these slots has an adapter that changes these sites."""
        return bool(self.ranks[:, slots].any())
