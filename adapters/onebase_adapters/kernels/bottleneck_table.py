"""Resident bottleneck adapters of one sublayer, by slot."""

from dataclasses import replace

import numpy as np
import torch

from onebase_adapters.kernels.table import Arena
from onebase_adapters.parts import Parts
from onebase_adapters.primitives import ACTIVATIONS, Bottleneck


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
