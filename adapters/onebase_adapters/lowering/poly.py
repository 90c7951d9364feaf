"""Polytropon (Ponti et al. 2023): each task mixes the same few low-rank skills in its own way."""

import torch

from onebase_adapters.errors import AdapterMismatchError
from onebase_adapters.lowering.source import Lowered, Source
from onebase_adapters.primitives.instruction_set import LowRank

_A, _B, _ROUTER = ".poly_lora_A", ".poly_lora_B", ".poly_router.module_logits"
_EPSILON = 1e-12
"""PEFT's, in the sum that mixing weights are divided by."""


def lower(source: Source) -> Lowered:
    """Each site has `poly_lora_A` [splits, skills, in / splits, r], `poly_lora_B` [splits, skills, r, out / splits]
    and `poly_router.module_logits` [tasks, splits * skills]. With the task given, one LowRank."""
    sites = sorted({name.removesuffix(_A) for name in source.tensors if name.endswith(_A)})
    source.refuse_others({f"{site}{part}" for site in sites for part in (_A, _B, _ROUTER)})
    return Lowered(tuple(_mixed(source, name) for name in sites))


def _mixed(source: Source, name: str) -> LowRank:
    site = source.site(name)
    a = source.take(name + _A, (None, None, None, None))
    splits, skills, width, rank = a.shape
    if splits * width != site.in_features or site.out_features % splits:
        raise AdapterMismatchError(
            f"Site {name!r} maps {site.in_features} -> {site.out_features}: the adapter's {splits} splits of "
            f"{width} inputs do not fit.",
            field="path",
        )
    b = source.take(name + _B, (splits, skills, rank, site.out_features // splits))
    logits = source.take(name + _ROUTER, (None, splits * skills))
    weights = torch.sigmoid(logits[source.task(len(logits))]).view(splits, skills)
    weights = weights / (weights.sum(1, keepdim=True) + _EPSILON)
    mixed_a = torch.einsum("qs,qsdr->rqd", weights, a).reshape(rank, site.in_features)
    mixed_b = torch.einsum("qs,qsrd->qdr", weights, b).reshape(site.out_features, rank)
    return LowRank(name, mixed_a, mixed_b, 1.0 / rank)
