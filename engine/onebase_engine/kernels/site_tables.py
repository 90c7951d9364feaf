"""All that resident adapters have at a group of linear sites, by slot."""

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import numpy as np
import torch

from onebase_adapters.base_shape import Site
from onebase_adapters.primitives.by_site import Parts
from onebase_engine.kernels.adapter_interface import AdapterKernels
from onebase_engine.kernels.arena import Arena
from onebase_engine.kernels.batch import Owners
from onebase_engine.kernels.tables import AffineTable, BottleneckTable, LowRankTable
from onebase_engine.kernels.tiles import low_rank_tiles

_Part = TypeVar("_Part")
Linear = Callable[[torch.Tensor], torch.Tensor]


class SiteTables:
    """All that resident adapters have at a group of sites that read the same input."""

    def __init__(self, sites: Sequence[Site], slots: int, kernels: AdapterKernels, device: torch.device) -> None:
        self.sites = tuple(sites)
        self.low_rank = LowRankTable(sites, slots, paired_columns=kernels.PAIRED_COLUMNS)
        self.affine = AffineTable(sites, slots, device)
        self._kernels = kernels

    def size(self, parts: Parts) -> int:
        """Elements that `put` takes from an arena."""
        return self.low_rank.size(parts.low_rank)

    def put(self, slot: int, parts: Parts, arena: Arena) -> None:
        """Make what an adapter has for these sites the slot's."""
        self.low_rank.put(slot, parts.low_rank, arena)
        self.affine.put(slot, parts)

    def clear(self, slot: int) -> None:
        """Forget what the slot has."""
        self.low_rank.clear(slot)
        self.affine.clear(slot)

    def touch(self, slots: np.ndarray) -> bool:
        """Whether any of these slots has an adapter that changes these sites."""
        return self.low_rank.touches(slots) or self.affine.touch(slots)

    def change_input(self, x: torch.Tensor, owners: Owners) -> torch.Tensor:
        """For a single site: x [rows, in], or a copy that is rescaled."""
        inputs = self.affine.inputs[0]
        if not inputs.touch(owners.slots):
            return x
        changed = x.clone()
        self._kernels.affine_rows(changed, owners, inputs, self.affine.none)
        return changed

    def apply(self, x: torch.Tensor, owners: Owners, product: Linear) -> torch.Tensor:
        """For a single site: `product` of x [rows, in] between the changes of input and output, [rows, out]."""
        if not len(owners.tiles):
            return product(x)
        if owners.affine:
            x = self.change_input(x, owners)
        y = product(x)
        self._kernels.add_low_rank(x, y, owners, self.low_rank)
        if owners.affine:
            self.change_output(y, owners)
        return y

    def recompute(self, x: torch.Tensor, y: torch.Tensor, owners: Owners, linears: Sequence[Linear]) -> None:
        """For several sites on one input: y [rows, sum of out] anew where one site's input is to be rescaled."""
        for number, (inputs, linear) in enumerate(zip(self.affine.inputs, linears, strict=True)):
            first, last = self.affine.columns[number : number + 2]
            for slot, vector in inputs.by_slot.items():
                rows = torch.as_tensor(np.flatnonzero(owners.slots == slot), device=x.device)
                if len(rows):
                    y[rows, first:last] = linear((x[rows].float() * vector).to(x.dtype))

    def change_output(self, y: torch.Tensor, owners: Owners) -> None:
        """y [rows, sum of out] rescaled and shifted in place."""
        if self.affine.scales.touch(owners.slots) or self.affine.shifts.touch(owners.slots):
            self._kernels.affine_rows(y, owners, self.affine.scales, self.affine.shifts)


class ExpertTables(SiteTables):
    """All that resident adapters have at one matrix of a mixture's experts. To the kernels each expert's part of an
    adapter is an adapter: the slot s of the expert e is e * slots + s."""

    def __init__(self, sites: Sequence[Site], slots: int, kernels: AdapterKernels, device: torch.device) -> None:
        """`sites`: one of each expert, of one size."""
        super().__init__(sites[:1], len(sites) * slots, kernels, device)
        self.sites = tuple(sites)
        self._slots = slots

    def size(self, parts: Parts) -> int:
        """As of any site."""
        return sum(self.low_rank.size(self._of(site, parts).low_rank) for site in self.sites)

    def put(self, slot: int, parts: Parts, arena: Arena) -> None:
        """As of any site."""
        for expert, site in enumerate(self.sites):
            super().put(expert * self._slots + slot, self._of(site, parts), arena)

    def clear(self, slot: int) -> None:
        """As of any site."""
        for expert in range(len(self.sites)):
            super().clear(expert * self._slots + slot)

    def owners(self, slots: np.ndarray, experts: np.ndarray, *, affine: bool) -> Owners:
        """The owners of rows by their adapters' `slots` and by which expert they are sent to, [rows] each."""
        own = np.where(slots > 0, experts * self._slots + slots, 0).astype(np.int32)
        return Owners(own, low_rank_tiles(own, self._kernels.TILE_ROWS), affine=affine)

    def _of(self, site: Site, parts: Parts) -> Parts:
        """One expert's, under the name of the first."""

        def own(found: Mapping[str, _Part]) -> dict[str, _Part]:
            return {self.sites[0].name: found[site.name]} if site.name in found else {}

        return Parts(own(parts.low_rank), own(parts.inputs), own(parts.outputs), own(parts.shifts), {})


def add_bottlenecks(
    x: torch.Tensor, y: torch.Tensor, owners: Owners, table: BottleneckTable, kernels: AdapterKernels
) -> None:
    """Change a sublayer's output y [rows, hidden] in place; x [rows, hidden] was its input. Contiguous."""
    for parallel in (False, True):
        if table.touch(owners.slots, parallel=parallel):
            kernels.add_bottleneck(x, y, owners, table, parallel=parallel)
