"""One adapter's primitives sorted by where they go, so that each of a model's many tables finds its own at once."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from onebase_adapters.primitives.instruction_set import Bottleneck, LowRank, Rescale, Shift
from onebase_adapters.primitives.lowered_adapter import LoweredAdapter


@dataclass(frozen=True)
class Parts:
    """By site (or sublayer) name."""

    low_rank: Mapping[str, LowRank]
    inputs: Mapping[str, torch.Tensor]
    """Factors [in_features] of a site's input."""
    outputs: Mapping[str, torch.Tensor]
    """Factors [out_features] of a site's output."""
    shifts: Mapping[str, torch.Tensor]
    bottlenecks: Mapping[str, Bottleneck]

    @classmethod
    def of(cls, adapter: LoweredAdapter) -> "Parts":
        """Sort an adapter's primitives."""
        rescales = adapter.of(Rescale)
        return cls(
            {update.site: update for update in adapter.of(LowRank)},
            {rescale.site: rescale.vector for rescale in rescales if rescale.side == "input"},
            {rescale.site: rescale.vector for rescale in rescales if rescale.side == "output"},
            {shift.site: shift.vector for shift in adapter.of(Shift)},
            {bottleneck.site: bottleneck for bottleneck in adapter.of(Bottleneck)},
        )
