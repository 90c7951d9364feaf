"""One step's flat batch as the model sees it: tokens of many sequences in a row, and whose they are.

Plain arrays on the host. Kernels that run elsewhere find copies there, made once a step and not once a layer.
"""

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch


@dataclass(frozen=True)
class Traits:
    """What kinds of changes resident adapters make, [slots] bool each: a step asks once, not at every site."""

    affine: np.ndarray
    bottleneck: np.ndarray

    @classmethod
    def none(cls, slots: int) -> "Traits":
        return cls(np.zeros(slots, np.bool_), np.zeros(slots, np.bool_))


@dataclass(frozen=True)
class Owners:
    """Which adapter each of some rows belongs to."""

    slots: np.ndarray
    """[rows] int32: the resident adapter; 0 is none."""
    tiles: np.ndarray
    """The same as `low_rank_tiles` arranges it; empty where no row has an adapter."""
    affine: bool = False
    """Whether any row's adapter has Rescale or Shift."""
    bottleneck: bool = False
    """Whether any row's adapter has Bottleneck."""
    _copies: dict[str, torch.Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def slots_on(self, device: torch.device) -> torch.Tensor:
        """`slots` on a device, copied there at the first call."""
        return self._on(device, "slots", self.slots)

    def tiles_on(self, device: torch.device) -> torch.Tensor:
        """`tiles` on a device, copied there at the first call."""
        return self._on(device, "tiles", self.tiles)

    def hold(self, tiles: torch.Tensor) -> None:
        """Let `tiles_on` give this copy, which may change from step to step."""
        self._copies["tiles"] = tiles

    def _on(self, device: torch.device, name: str, array: np.ndarray) -> torch.Tensor:
        if name not in self._copies:
            self._copies[name] = torch.from_numpy(array).to(device, non_blocking=True)
        return self._copies[name]


@dataclass(frozen=True)
class DeviceArrays:
    """A batch's arrays on the model's device, all int32."""

    positions: torch.Tensor
    visible: torch.Tensor
    cache_slots: torch.Tensor
    tables: torch.Tensor
    items: torch.Tensor
    most_tokens: int
    """Most tokens of a sequence."""


@dataclass(frozen=True)
class Batch:
    """T tokens of S sequences, sequence by sequence, in ascending positions."""

    token_ids: torch.Tensor
    """[T] int64, on the model's device."""
    positions: np.ndarray
    """[T] int64: place in its sequence."""
    visible: np.ndarray
    """[T] int64: the last position that it attends to; its own in a decoder, its sequence's last in an encoder."""
    owners: Owners
    """The owners of the T tokens."""
    head_owners: Owners
    """The owners of the `sample_rows`, which are all that the LM head sees."""
    query_start: np.ndarray
    """[S + 1] int64: sequence s has the tokens query_start[s] .. query_start[s + 1]."""
    tables: np.ndarray
    """[S, most blocks] int32: cache blocks of each sequence."""
    cache_slots: np.ndarray
    """[T] int64: where the token's key and value go, block * BLOCK + offset."""
    sample_rows: torch.Tensor
    """[n] int64: the tokens whose next token is wanted."""
    virtual_rows: np.ndarray
    """[v] int64: the rows of T that are learned embeddings; their `token_ids` mean nothing."""
    virtual_indices: np.ndarray
    """[v] int64: which of their adapter's virtual tokens they are."""
    items: np.ndarray
    """As the kernels' `attention_items` makes them."""
    held: DeviceArrays | None = None
    """What `on_device` gives, where that is kept from step to step."""

    @cached_property
    def on_device(self) -> DeviceArrays:
        """Copies on the device, in one transfer."""
        if self.held is not None:
            return self.held
        arrays = (self.positions, self.visible, self.cache_slots, self.tables, self.items)
        starts = np.cumsum([0] + [_aligned(array.size) for array in arrays])
        packed = np.zeros(starts[-1], np.int32)
        for start, array in zip(starts, arrays, strict=False):
            packed[start : start + array.size] = array.ravel()
        there = torch.from_numpy(packed).to(self.token_ids.device, non_blocking=True)
        positions, visible, cache_slots, tables, items = (
            there[start : start + array.size].view(array.shape)
            for start, array in zip(starts, arrays, strict=False)
        )
        most_tokens = int(np.diff(self.query_start).max())
        return DeviceArrays(positions, visible, cache_slots, tables, items, most_tokens)


def _aligned(elements: int) -> int:
    """Rounded up to 16 bytes of int32: kernels are compiled anew for pointers of another alignment."""
    return (elements + 3) // 4 * 4


BLOCK = 16
"""Tokens in a cache block: one vector of keys on a CPU."""
