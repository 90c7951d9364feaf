"""Several adapters as one, each with a weight: what each changes of the base's functions is weighted and added up.

At a linear site W, an adapter with factors i of the input and o of the output, and with a shift t, changes
W x by o * (W (i * x) + B A x) + t - W x. A sum of such changes is an adapter again: kernels, slots and pages have
nothing to learn.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from onebase_adapters.errors import AdapterMismatchError
from onebase_adapters.primitives.by_site import Parts
from onebase_adapters.primitives.instruction_set import (
    Bottleneck,
    Head,
    KVPrefix,
    LowRank,
    Primitive,
    Rescale,
    Shift,
    Template,
    VirtualTokens,
)
from onebase_adapters.primitives.lowered_adapter import LoweredAdapter

_WHOLE = {
    VirtualTokens: "learned prompt tokens",
    KVPrefix: "a learned prefix",
    Head: "a classification head",
    Template: "a template",
}
"""Primitives that an adapter has once, and only as they were trained."""
_SMALLEST = 1e-6
"""A factor of a site's output below this cannot be divided out of an update that it is not for."""


@dataclass(frozen=True)
class Weighted:
    """An adapter that is to be composed with others."""

    name: str
    """For messages."""
    adapter: LoweredAdapter
    weight: float


def compose(digest: str, adapters: Sequence[Weighted]) -> LoweredAdapter:
    """The adapter that changes the base by the weighted sum of what all of them change.

    Ranks add up, as in PEFT's `add_weighted_adapter` with "cat"; factors become 1 + sum of weight * (factor - 1);
    bottlenecks of one sublayer lie side by side. Raises AdapterMismatchError for what does not compose.
    """
    whole = _whole(adapters)
    parts = [(Parts.of(each.adapter), each.weight) for each in adapters]
    inputs = _sum([(part.inputs, weight) for part, weight in parts], neutral=1.0)
    outputs = _sum([(part.outputs, weight) for part, weight in parts], neutral=1.0)
    shifts = _sum([(part.shifts, weight) for part, weight in parts], neutral=0.0)
    updated = dict.fromkeys(site for part, _ in parts for site in part.low_rank)
    if both := inputs.keys() & (outputs.keys() | updated.keys()):
        raise AdapterMismatchError(
            f"{_names(adapters)} do not compose: {min(both)} has its input multiplied and its output changed.",
            field="adapters",
        )
    if tiny := [site for site in updated if site in outputs and bool((outputs[site].abs() < _SMALLEST).any())]:
        raise AdapterMismatchError(
            f"{_names(adapters)} do not compose with these weights: at {tiny[0]} their factors cancel the output.",
            field="adapters",
        )
    primitives: list[Primitive] = [*whole]
    primitives += [_low_rank(site, parts, outputs.get(site)) for site in updated]
    primitives += [Rescale(site, vector, "input") for site, vector in inputs.items()]
    primitives += [Rescale(site, vector, "output") for site, vector in outputs.items()]
    primitives += [Shift(site, vector) for site, vector in shifts.items()]
    for site in dict.fromkeys(site for part, _ in parts for site in part.bottlenecks):
        primitives.append(
            _bottleneck([(part.bottlenecks[site], w) for part, w in parts if site in part.bottlenecks])
        )
    notes = dict.fromkeys(note for each in adapters for note in each.adapter.notes)
    return LoweredAdapter(digest, "composed", tuple(primitives), tuple(notes))


def _whole(adapters: Sequence[Weighted]) -> list[Primitive]:
    found: list[Primitive] = []
    for kind, what in _WHOLE.items():
        owners = [each for each in adapters if each.adapter.of(kind)]
        if len(owners) > 1:
            raise AdapterMismatchError(
                f"{_names(owners)} do not compose: each has {what}, and a request has one.", field="adapters"
            )
        for each in owners:
            if each.weight != 1:
                raise AdapterMismatchError(f"{each.name} has {what}: its weight can only be 1.", field="adapters")
            found += each.adapter.of(kind)
    return found


def _sum(vectors: Sequence[tuple[Mapping[str, torch.Tensor], float]], *, neutral: float) -> dict[str, torch.Tensor]:
    """By site: neutral + sum of weight * (vector - neutral)."""
    total: dict[str, torch.Tensor] = {}
    for by_site, weight in vectors:
        for site, vector in by_site.items():
            total[site] = total.get(site, neutral) + weight * (vector.float() - neutral)
    return total


def _low_rank(site: str, parts: Sequence[tuple[Parts, float]], factor: torch.Tensor | None) -> LowRank:
    """The site's updates in a row. Behind them comes one `factor` [out] for all, in place of each adapter's own."""
    mine = [(part, part.low_rank[site], weight) for part, weight in parts if site in part.low_rank]
    if factor is None and len(mine) == 1:
        _, update, weight = mine[0]
        return replace(update, scale=update.scale * weight)
    columns = []
    for part, update, weight in mine:
        scaled = update.b.float() * (update.scale * weight)
        if factor is not None:
            scaled = scaled * (part.outputs.get(site, torch.ones_like(factor)) / factor)[:, None]
        columns.append(scaled)
    return LowRank(site, torch.cat([update.a.float() for _, update, _ in mine]), torch.cat(columns, 1), 1.0)


def _bottleneck(parts: Sequence[tuple[Bottleneck, float]]) -> Bottleneck:
    first, weight = parts[0]
    if len(parts) == 1:
        return replace(first, scale=first.scale * weight)
    if any((part.activation, part.parallel) != (first.activation, first.parallel) for part, _ in parts):
        raise AdapterMismatchError(
            f"Two bottlenecks at {first.site} differ in their activation or placement: they do not compose.",
            field="adapters",
        )
    return replace(
        first,
        down=torch.cat([part.down for part, _ in parts]),
        down_bias=torch.cat([part.down_bias for part, _ in parts]),
        up=torch.cat([part.up * (part.scale * weight) for part, weight in parts], 1),
        up_bias=torch.stack([part.up_bias * (part.scale * weight) for part, weight in parts]).sum(0),
        scale=1.0,
    )


def _names(adapters: Sequence[Weighted]) -> str:
    return " and ".join(each.name for each in adapters)
