"""LoRA (Hu et al. 2021) and what shares its form: QLoRA (Dettmers et al. 2023), rsLoRA (Kalajdzievski 2023),
PiSSA (Meng et al. 2024), DoRA (Liu et al. 2024) and AdaLoRA (Zhang et al. 2023)."""

import re
from collections.abc import Mapping

import torch

from onebase_adapters.errors import AdapterFormatError, AdapterMismatchError
from onebase_adapters.lowering.experts import split_experts
from onebase_adapters.lowering.lora_scale import scale_of
from onebase_adapters.lowering.source import Lowered, Source, refuse_norm
from onebase_adapters.primitives.instruction_set import LowRank, Primitive, Rescale, Shift

_KEY = re.compile(
    r"^(?P<site>.+)\.(?P<part>lora_A|lora_B|lora_E|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"(?:\.(?P<leaf>weight|bias))?$"
)
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
    updates, source = split_experts(source)
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in source.tensors.items():
        match = _KEY.match(name)
        if match is None:
            refuse_norm(name)
            raise AdapterFormatError(f"Tensor {name!r} is not a LoRA matrix.", field="path")
        part = match["part"].removeprefix("lora_") + (".bias" if match["leaf"] == "bias" else "")
        parts.setdefault(match["site"], {})[part] = tensor.float()
    primitives: list[Primitive] = [update for update in updates if update.a.any() and update.b.any()]
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
    update = LowRank(name, a, b, scale_of(source.config, name, rank))
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
    return LowRank(name, a, b, scale_of(source.config, name, a.shape[0]))


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
