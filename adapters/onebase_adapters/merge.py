"""An adapter put into the weights that it changes, site by site: exact, where weights can carry it at all."""

from dataclasses import dataclass

import torch

from onebase_adapters.errors import AdapterError
from onebase_adapters.lowering.source import BaseWeights
from onebase_adapters.primitives.instruction_set import LowRank, Rescale, Shift
from onebase_adapters.primitives.lowered_adapter import LoweredAdapter


@dataclass(frozen=True)
class Merged:
    """A site's weights with the adapter in them, float32."""

    weight: torch.Tensor
    """As `BaseWeights.weight` has it."""
    bias: torch.Tensor | None


def check_mergeable(adapter: LoweredAdapter) -> None:
    """Raises AdapterError for an adapter that is more than a change of weights."""
    others = {type(one).__name__ for one in adapter.primitives if not isinstance(one, LowRank | Rescale | Shift)}
    if others:
        raise AdapterError(
            f"An adapter of {adapter.method} is more than a change of weights ({', '.join(sorted(others))}): it "
            "cannot be merged, only served.",
            field="path",
        )


def changed_sites(adapter: LoweredAdapter) -> set[str]:
    """Where it changes something."""
    return {one.site for one in adapter.primitives if isinstance(one, LowRank | Rescale | Shift)}


def merge_site(adapter: LoweredAdapter, site: str, weights: BaseWeights, *, embedding: bool = False) -> Merged:
    """The site as the adapter has it: input rescaled, product and update, output rescaled, shifted. For the
    `embedding`, whose input is one-hot, the update is of its rows."""
    weight, bias = weights.weight(site).clone(), weights.bias(site)
    for update in (one for one in adapter.of(LowRank) if one.site == site):
        change = update.scale * (update.b.float() @ update.a.float())
        weight += change.T if embedding else change
    for scale in (one for one in adapter.of(Rescale) if one.site == site):
        vector = scale.vector.float()
        if scale.side == "input":
            weight *= vector
        else:
            weight *= vector[:, None]
            bias = None if bias is None else bias * vector
    for shift in (one for one in adapter.of(Shift) if one.site == site):
        bias = shift.vector.float() if bias is None else bias + shift.vector.float()
    return Merged(weight, bias)
