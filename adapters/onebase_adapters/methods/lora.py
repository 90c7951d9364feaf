"""LoRA (Hu et al. 2021) and what shares its form: QLoRA (Dettmers et al. 2023), rsLoRA (Kalajdzievski 2023)."""

import math
import re
from collections.abc import Mapping
from typing import Any

import torch

from onebase_adapters.base.shape import BaseShape
from onebase_adapters.errors import AdapterFormatError, AdapterMismatchError
from onebase_adapters.primitives import LowRank

_KEY = re.compile(r"^(?:base_model\.model\.)?(?P<site>.+)\.lora_(?P<half>[AB])(?:\.default)?\.weight$")
_UNSERVED = {"use_dora": "DoRA", "use_qalora": "QALoRA", "alora_invocation_tokens": "activated LoRA"}


def lower(config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], base: BaseShape) -> tuple[LowRank, ...]:
    """One LowRank for each adapted site; ranks are the tensors' own, scales follow PEFT's configuration."""
    for key, name in _UNSERVED.items():
        if config.get(key):
            raise AdapterFormatError(f"{name} is not served.", field=key)
    halves: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        match = _KEY.match(name)
        if match is None:
            raise AdapterFormatError(f"Tensor {name!r} is not a LoRA matrix of a linear site.", field="path")
        halves.setdefault(match["site"], {})[match["half"]] = tensor
    return tuple(_site(site, pair, config, base) for site, pair in sorted(halves.items()))


def _site(name: str, pair: Mapping[str, torch.Tensor], config: Mapping[str, Any], base: BaseShape) -> LowRank:
    site = base.sites.get(name)
    if site is None:
        raise AdapterMismatchError(f"Base {base.name} has no linear site {name!r}.", field="path")
    if set(pair) != {"A", "B"}:
        missing = "A" if "B" in pair else "B"
        raise AdapterFormatError(f"Site {name!r} lacks lora_{missing}.", field="path")
    a, b = pair["A"], pair["B"]
    if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1]:
        raise AdapterFormatError(
            f"Site {name!r}: lora_A {list(a.shape)} and lora_B {list(b.shape)} do not share a rank.",
            field="path",
        )
    if (a.shape[1], b.shape[0]) != (site.in_features, site.out_features):
        raise AdapterMismatchError(
            f"Site {name!r}: the adapter maps {a.shape[1]} -> {b.shape[0]}, the base's site "
            f"{site.in_features} -> {site.out_features}.",
            field="path",
        )
    rank = a.shape[0]
    stated = _pattern(config.get("rank_pattern"), name, config.get("r"))
    if stated is not None and stated != rank:
        raise AdapterFormatError(
            f"Site {name!r}: adapter_config.json says rank {stated}, tensors have {rank}.", field="r"
        )
    alpha = float(_pattern(config.get("alpha_pattern"), name, config.get("lora_alpha", rank)))
    return LowRank(name, a, b, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def _pattern(patterns: Mapping[str, Any] | None, site: str, default: Any) -> Any:
    """PEFT's rule: a pattern is a regular expression for the end of the site's name, at a dot."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", site):
            return value
    return default
