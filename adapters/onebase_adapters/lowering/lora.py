"""LoRA (Hu et al. 2021) and what shares its form: QLoRA (Dettmers et al. 2023), rsLoRA (Kalajdzievski 2023),
PiSSA (Meng et al. 2024), DoRA (Liu et al. 2024) and AdaLoRA (Zhang et al. 2023)."""

import math
import re
from collections.abc import Mapping
from typing import Any

import torch

from onebase_adapters.errors import AdapterFormatError, AdapterMismatchError
from onebase_adapters.lowering.source import Lowered, Source, refuse_norm
from onebase_adapters.primitives.instruction_set import LowRank, Primitive, Rescale, Shift

_KEY = re.compile(
    r"^(?P<site>.+)\.(?P<part>lora_A|lora_B|lora_E|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"(?:\.(?P<leaf>weight|bias))?$"
)
_LARGEST = torch.finfo(torch.float32).max
_UNSERVED = {
    "use_qalora": "QALoRA",
    "alora_invocation_tokens": "activated LoRA",
    "arrow_config": "Arrow, which chooses among its adapters for each token,",
    "layer_replication": "LoRA on replicated layers",
    "kasa_config": "KaSA, which takes small singular values out of the base,",
    "monteclora_config": "MonteCLoRA",
    "use_bdlora": "BD-LoRA",
}
_TAKES_FROM_THE_BASE = ("pissa", "olora", "corda", "lora_ga")
"""Begin with a part of the base's weights, which they subtract from it. What PEFT saves of them unconverted is for
the base without that part."""


def lower(source: Source) -> Lowered:
    """One LowRank for each adapted site; ranks are the tensors' own, scales follow PEFT's configuration."""
    for key, name in _UNSERVED.items():
        if source.config.get(key):
            raise AdapterFormatError(f"{name} is not served.", field=key)
    start = source.config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_TAKES_FROM_THE_BASE):
        raise AdapterFormatError(
            f"The adapter began as {start}: its matrices are for a base without the part that they began with. "
            "Save it as a LoRA of the whole base: save_pretrained(..., path_initial_model_for_weight_conversion="
            "FOLDER), with the adapter as it was before training in FOLDER.",
            field="init_lora_weights",
        )
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in source.tensors.items():
        match = _KEY.match(name)
        if match is None:
            refuse_norm(name)
            raise AdapterFormatError(f"Tensor {name!r} is not a LoRA matrix.", field="path")
        part = match["part"].removeprefix("lora_") + (".bias" if match["leaf"] == "bias" else "")
        parts.setdefault(match["site"], {})[part] = tensor.float()
    primitives: list[Primitive] = []
    for site, found in sorted(parts.items()):
        if site == source.base.embedding:
            primitives.append(_embedding(source, site, found))
        else:
            primitives += _linear(source, site, found)
    return Lowered(tuple(primitives))


def _linear(source: Source, name: str, parts: Mapping[str, torch.Tensor]) -> list[Primitive]:
    site = source.site(name)
    a, b = _pair(name, parts, "A", "B", (site.in_features, site.out_features))
    rank = a.shape[0]
    if "E" in parts:
        a = a * parts["E"]
    update = LowRank(name, a, b, _scale(source.config, name, rank))
    primitives: list[Primitive] = [update] if a.any() and b.any() else []
    shift = update.scale * parts["B.bias"] if "B.bias" in parts else None
    if "magnitude_vector" in parts:
        # DoRA: y = m / |W + sBA| (W x + sBA x) + bias; the norm is over each output's row.
        weight = source.weights.weight(name)
        norm = (weight + update.scale * (b @ a)).norm(dim=1)
        ratio = parts["magnitude_vector"].flatten() / norm
        primitives.append(Rescale(name, ratio, "output"))
        bias = source.weights.bias(name)
        if bias is not None:
            shift = bias * (1 - ratio) + (0 if shift is None else shift)
    if shift is not None:
        primitives.append(Shift(name, shift))
    return primitives


def _embedding(source: Source, name: str, parts: Mapping[str, torch.Tensor]) -> LowRank:
    if "magnitude_vector" in parts:
        raise AdapterFormatError("DoRA of the embedding is not served. Train it on linear modules.", field="path")
    a, b = _pair(name, parts, "embedding_A", "embedding_B", (source.base.vocab, source.base.hidden))
    return LowRank(name, a, b, _scale(source.config, name, a.shape[0]))


def _pair(
    name: str, parts: Mapping[str, torch.Tensor], first: str, second: str, sizes: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """A [rank, in] and B [out, rank], checked against (in, out)."""
    for part in (first, second):
        if part not in parts:
            raise AdapterFormatError(f"Site {name!r} lacks lora_{part}.", field="path")
    a, b = parts[first], parts[second]
    if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1]:
        raise AdapterFormatError(
            f"Site {name!r}: lora_{first} {list(a.shape)} and lora_{second} {list(b.shape)} do not share a rank.",
            field="path",
        )
    if not a.shape[0]:
        raise AdapterFormatError(f"Site {name!r}: rank 0 changes nothing; leave the site out.", field="path")
    if (a.shape[1], b.shape[0]) != sizes:
        raise AdapterMismatchError(
            f"Site {name!r}: the adapter maps {a.shape[1]} -> {b.shape[0]}, the base's site "
            f"{sizes[0]} -> {sizes[1]}.",
            field="path",
        )
    return a, b


def _scale(config: Mapping[str, Any], site: str, rank: int) -> float:
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
    """PEFT's rule: a pattern is a regular expression for the end of the site's name, at a dot."""
    patterns = config.get(field) or {}
    try:
        for pattern, value in patterns.items():
            if re.match(rf"(.*\.)?({pattern})$", site):
                return value
    except (AttributeError, re.error) as error:
        raise AdapterFormatError(
            f"adapter_config.json: {field} maps regular expressions to numbers: {error}", field=field
        ) from error
    return default
