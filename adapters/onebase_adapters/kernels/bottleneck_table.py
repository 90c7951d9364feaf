"""Resident bottleneck adapters of one sublayer, by slot."""

from dataclasses import replace

import numpy as np
import torch

from onebase_adapters.kernels.table import Arena
from onebase_adapters.parts import Parts
from onebase_adapters.primitives import ACTIVATIONS, Bottleneck


class BottleneckTable:
    """What is added behind, or beside, the sublayer for each token's adapter."""

    def __init__(self, name: str, slots: int, device: torch.device) -> None:
        """`name`: the sublayer's module path."""
        self.name = name
        self.parts: dict[int, Bottleneck] = {}
        """By slot; weights are views of the arena, of transposed matrices."""
        self.down, self.down_bias, self.up, self.up_bias, self.ranks = np.zeros((5, slots), np.int64)
        """By slot: addresses of [hidden, rank], [rank] (float32), [rank, hidden], [hidden] (float32); rank or 0."""
        self.activations = np.zeros(slots, np.int64)
        """Places in `ACTIVATIONS`."""
        self.scales = np.zeros(slots, np.float32)
        self.parallel = np.zeros(slots, np.bool_)
        self._device = device

    def size(self, parts: Parts) -> int:
        """Elements that `put` takes from an arena."""
        part = parts.bottlenecks.get(self.name)
        return Arena.size(part.down.numel()) + Arena.size(part.up.numel()) if part else 0

    def put(self, slot: int, parts: Parts, arena: Arena) -> None:
        """Make an adapter's bottleneck for this sublayer the slot's, if it has one."""
        part = parts.bottlenecks.get(self.name)
        if part is None:
            return
        down, up = arena.hold(part.down.t()), arena.hold(part.up.t())
        down_bias = part.down_bias.float().contiguous().to(self._device)
        up_bias = part.up_bias.float().contiguous().to(self._device)
        self.parts[slot] = replace(part, down=down.t(), up=up.t(), down_bias=down_bias, up_bias=up_bias)
        self.down[slot], self.up[slot] = down.data_ptr(), up.data_ptr()
        self.down_bias[slot], self.up_bias[slot] = down_bias.data_ptr(), up_bias.data_ptr()
        self.ranks[slot] = len(part.down)
        self.activations[slot] = ACTIVATIONS.index(part.activation)
        self.scales[slot] = part.scale
        self.parallel[slot] = part.parallel

    def clear(self, slot: int) -> None:
        """Forget the slot's weights."""
        self.ranks[slot] = 0
        self.parts.pop(slot, None)

    def touch(self, slots: np.ndarray, *, parallel: bool) -> bool:
        """Whether any of these slots has a part of this kind."""
        return bool(((self.ranks[slots] > 0) & (self.parallel[slots] == parallel)).any())
