"""Resident Rescale and Shift vectors of a group of sites that read the same input, by slot."""

from collections.abc import Sequence

import numpy as np
import torch

from onebase_adapters.base.shape import Site
from onebase_adapters.parts import Parts


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
