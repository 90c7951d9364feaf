"""Resident low-rank weights as the kernels read them: each adapter in memory of its own, and where a matrix lies.

Each slot has its own ranks: nothing is padded to the largest.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch

from onebase_adapters.base_shape import Site
from onebase_adapters.primitives.by_site import Parts
from onebase_adapters.primitives.instruction_set import ACTIVATIONS, Bottleneck, LowRank
from onebase_engine.kernels.arena import Arena

_LANES = 16
"""Columns that a kernel takes at once, where it takes them in pairs of rows."""


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
        """Room for the largest sum of a slot's ranks that there has been: it grows in steps and never shrinks,
        because captured steps (see `model.replay`) are made for it."""
        self._rows: torch.Tensor | None = None
        self._stale = True
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
        self.widest = max(self.widest, _rounded(int(self.ranks.sum(0).max()), _LANES))
        self._stale = True

    def rows_on(self, device: torch.device) -> torch.Tensor:
        """All of this on `device`, [slots, 2 + 4 * sites] int64: for each slot the address of A, those of each B,
        the ranks, the bits of the scales, and the columns. It stays where it is."""
        if self._stale or self._rows is None:
            bits = self.scales.view(np.int32)
            columns = np.repeat(self.columns[:, None], len(self.a), axis=1)
            rows = torch.from_numpy(np.concatenate([self.a[None], self.b, self.ranks, bits, columns]).T.copy())
            self._rows = rows.to(device) if self._rows is None else self._rows.copy_(rows)
            self._stale = False
        return self._rows

    @property
    def description(self) -> dict[str, int]:
        """Numbers of sites and slots, and the arrays' addresses, which stay as they are."""
        arrays = ("columns", "a", "b", "ranks", "scales", "spans")
        addresses = {name: getattr(self, name).ctypes.data for name in arrays}
        return {"sites": len(self.sites), "slots": len(self.a), **addresses}

    def touches(self, slots: np.ndarray) -> bool:
        """Whether any of these slots has an adapter that changes these sites."""
        return bool(self.ranks[:, slots].any())


class Vectors:
    """Float32 vectors by slot, and their addresses."""

    def __init__(self, slots: int, device: torch.device) -> None:
        self.by_slot: dict[int, torch.Tensor] = {}
        self.addresses = np.zeros(slots, np.int64)
        """0 for none."""
        self._device = device
        self._there: torch.Tensor | None = None

    def put(self, slot: int, vector: torch.Tensor) -> None:
        """Keep a vector for the slot."""
        held = self.by_slot[slot] = vector.float().contiguous().to(self._device)
        self.addresses[slot] = held.data_ptr()
        self._there = None

    def clear(self, slot: int) -> None:
        """Forget the slot's vector."""
        self.addresses[slot] = 0
        self.by_slot.pop(slot, None)
        self._there = None

    def addresses_on_device(self) -> torch.Tensor:
        """[slots] int64, where the vectors are."""
        if self._there is None:
            self._there = torch.from_numpy(self.addresses.copy()).to(self._device)
        return self._there

    def touch(self, slots: np.ndarray) -> bool:
        """Whether any of these slots has one."""
        return bool(self.addresses[slots].any())


class AffineTable:
    """Factors of the sites' inputs, factors of their outputs side by side, and what is added to these."""

    def __init__(self, sites: Sequence[Site], slots: int, device: torch.device) -> None:
        self.sites = tuple(sites)
        self.columns = [0, *np.cumsum([site.out_features for site in sites]).tolist()]
        """[sites + 1]: the sites' column ranges in the group's output."""
        self.inputs = [Vectors(slots, device) for _ in sites]
        self.scales = Vectors(slots, device)
        self.shifts = Vectors(slots, device)
        self.none = Vectors(slots, device)
        """Stays empty."""

    def put(self, slot: int, parts: Parts) -> None:
        """Make an adapter's vectors for these sites the slot's."""
        for vectors, site in zip(self.inputs, self.sites, strict=True):
            if site.name in parts.inputs:
                vectors.put(slot, parts.inputs[site.name])
        if any(site.name in parts.outputs for site in self.sites):
            factors = [parts.outputs.get(site.name, torch.ones(site.out_features)) for site in self.sites]
            self.scales.put(slot, torch.cat(factors))
        if any(site.name in parts.shifts for site in self.sites):
            terms = [parts.shifts.get(site.name, torch.zeros(site.out_features)) for site in self.sites]
            self.shifts.put(slot, torch.cat(terms))

    def clear(self, slot: int) -> None:
        """Forget the slot's vectors."""
        for vectors in (*self.inputs, self.scales, self.shifts):
            vectors.clear(slot)

    def touch(self, slots: np.ndarray) -> bool:
        """Whether any of these slots has an adapter with vectors here."""
        return any(vectors.touch(slots) for vectors in (*self.inputs, self.scales, self.shifts))


class BottleneckTable:
    """What is added behind, or beside, the sublayer for each token's adapter."""

    def __init__(self, name: str, slots: int, device: torch.device, *, transposed: bool) -> None:
        """`name`: the sublayer's module path; `transposed`: whether `down` is kept as [hidden, rank]."""
        self.name = name
        self.parts: dict[int, Bottleneck] = {}
        """By slot; weights are views of the arena."""
        self.down, self.down_bias, self.up, self.up_bias, self.ranks = np.zeros((5, slots), np.int64)
        """By slot: addresses of the matrix to the bottleneck and its bias (float32), of the matrix from it, [rank,
        hidden], and its bias; rank or 0."""
        self.activations = np.zeros(slots, np.int64)
        """Places in `ACTIVATIONS`."""
        self.scales = np.zeros(slots, np.float32)
        self.parallel = np.zeros(slots, np.bool_)
        self._device = device
        self._transposed = transposed
        self._rows: dict[bool, torch.Tensor] = {}

    def size(self, parts: Parts) -> int:
        """Elements that `put` takes from an arena."""
        part = parts.bottlenecks.get(self.name)
        return Arena.size(part.down.numel()) + Arena.size(part.up.numel()) if part else 0

    def put(self, slot: int, parts: Parts, arena: Arena) -> None:
        """Make an adapter's bottleneck for this sublayer the slot's, if it has one."""
        part = parts.bottlenecks.get(self.name)
        if part is None:
            return
        down = arena.hold(part.down.t()).t() if self._transposed else arena.hold(part.down)
        up = arena.hold(part.up.t())
        down_bias = part.down_bias.float().contiguous().to(self._device)
        up_bias = part.up_bias.float().contiguous().to(self._device)
        self.parts[slot] = replace(part, down=down, up=up.t(), down_bias=down_bias, up_bias=up_bias)
        self.down[slot], self.up[slot] = down.data_ptr(), up.data_ptr()
        self.down_bias[slot], self.up_bias[slot] = down_bias.data_ptr(), up_bias.data_ptr()
        self.ranks[slot] = len(part.down)
        self.activations[slot] = ACTIVATIONS.index(part.activation)
        self.scales[slot] = part.scale
        self.parallel[slot] = part.parallel
        self._rows.clear()

    def clear(self, slot: int) -> None:
        """Forget the slot's weights."""
        self.ranks[slot] = 0
        self.parts.pop(slot, None)
        self._rows.clear()

    def rows_on_device(self, *, parallel: bool) -> torch.Tensor:
        """The parts of one kind as low-rank updates of one site, [slots, 9] int64: addresses of the two matrices,
        the rank, the bits of the scale, and the columns; then the addresses of the biases, and the activation."""
        if parallel not in self._rows:
            ranks = np.where(self.parallel == parallel, self.ranks, 0)
            none = np.zeros_like(ranks)
            width = next((len(part.up) for part in self.parts.values()), 0)
            rows = [
                self.down, self.up, ranks, self.scales.view(np.int32), none, none + width, self.down_bias,
                self.up_bias, self.activations,
            ]  # fmt: skip
            self._rows[parallel] = torch.from_numpy(np.stack(rows, axis=1)).to(self._device)
        return self._rows[parallel]

    def touch(self, slots: np.ndarray, *, parallel: bool) -> bool:
        """Whether any of these slots has a part of this kind."""
        return bool(((self.ranks[slots] > 0) & (self.parallel[slots] == parallel)).any())
