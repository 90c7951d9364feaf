"""All that resident adapters have at a group of linear sites, by slot."""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from onebase_adapters.base_shape import Site
from onebase_adapters.primitives.by_site import Parts
from onebase_engine.kernels.adapter_interface import AdapterKernels
from onebase_engine.kernels.arena import Arena
from onebase_engine.kernels.batch import Owners
from onebase_engine.kernels.tables import AffineTable, BottleneckTable, LowRankTable

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


def add_bottlenecks(
    x: torch.Tensor, y: torch.Tensor, owners: Owners, table: BottleneckTable, kernels: AdapterKernels
) -> None:
    """Change a sublayer's output y [rows, hidden] in place; x [rows, hidden] was its input. Contiguous."""
    for parallel in (False, True):
        if table.touch(owners.slots, parallel=parallel):
            kernels.add_bottleneck(x, y, owners, table, parallel=parallel)
