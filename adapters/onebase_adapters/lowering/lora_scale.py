"""The scale of a LoRA's update, by PEFT's rules: alpha over the rank, with exceptions for sites by their names."""

import math
import re
from collections.abc import Mapping
from typing import Any

import torch

from onebase_adapters.errors import AdapterFormatError

_LARGEST = torch.finfo(torch.float32).max


def scale_of(config: Mapping[str, Any], site: str, rank: int) -> float:
    """What the update of a site, or of a parameter, is multiplied by. Raises AdapterFormatError."""
    if str(config.get("peft_type")).upper() == "ADALORA":
        # PEFT divides by the rank that training began with, whatever is left of it.
        alpha, divisor = config.get("lora_alpha", 8), _number(config.get("init_r", rank), "init_r") + 1e-5
    else:
        stated = _pattern(config, "rank_pattern", site, config.get("r"))
        if stated is not None and _number(stated, "r") != rank:
            raise AdapterFormatError(
                f"Site {site!r}: adapter_config.json says rank {stated}, tensors have {rank}.", field="r"
            )
        alpha = _pattern(config, "alpha_pattern", site, config.get("lora_alpha", rank))
        divisor = math.sqrt(rank) if config.get("use_rslora") else rank
    return _number(alpha, "lora_alpha") / divisor


def _number(value: Any, field: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= _LARGEST:
        hint = " Write it without quotes." if isinstance(value, str) and value.strip().isdigit() else ""
        raise AdapterFormatError(f"adapter_config.json: {field} {value!r} is not a number.{hint}", field=field)
    return float(value)


def _pattern(config: Mapping[str, Any], field: str, site: str, default: Any) -> Any:
    """PEFT's rule: a pattern is a regular expression for the end of the name of the site, or of its parameter where
    that is the target, at a dot."""
    patterns = config.get(field) or {}
    try:
        for pattern, value in patterns.items():
            if any(re.match(rf"(.*\.)?({pattern})$", name) for name in (site, f"{site}.weight")):
                return value
    except (AttributeError, re.error) as error:
        raise AdapterFormatError(
            f"adapter_config.json: {field} maps regular expressions to numbers: {error}", field=field
        ) from error
    return default
