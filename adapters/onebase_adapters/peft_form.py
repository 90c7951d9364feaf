"""What was lowered, raised again: an adapter as PEFT's two files, whatever method it came from.

Low-rank updates become LoRA (and DoRA, with rescaled outputs), factors (IA)^3, learned embeddings prompt tuning,
learned keys and values prefix tuning. What PEFT has no form for is refused with the reason.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from onebase_adapters.base_shape import BaseShape
from onebase_adapters.errors import AdapterError
from onebase_adapters.lowering.source import BaseWeights
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

_STEM = "base_model.model."
_CLOSE = 1e-3
"""How far a shift may be from what DoRA's factor leaves of the base's bias, relative to the bias."""
_WITHOUT: Mapping[type[Primitive], str] = {
    Bottleneck: "layers of its own behind the base's blocks",
    Head: "a classifier with a bias, which transformers' models for classification have not",
    Template: "a text around the prompt: send that text with each prompt instead",
}


@dataclass(frozen=True)
class PeftForm:
    """The contents of PEFT's two files."""

    config: dict[str, Any]
    tensors: dict[str, torch.Tensor]


def peft_form(adapter: LoweredAdapter, base: BaseShape, weights: BaseWeights) -> PeftForm:
    """Raises AdapterError for what PEFT has no form for."""
    kinds: set[type[Primitive]] = {type(one) for one in adapter.primitives}
    for kind, reason in _WITHOUT.items():
        if kind in kinds:
            raise _formless(f"it is {reason}")
    if not kinds:
        raise _formless("it changes nothing")
    if kinds == {VirtualTokens}:
        config, tensors = _prompt(adapter.of(VirtualTokens)[0], base)
    elif kinds == {KVPrefix}:
        config, tensors = _prefix(adapter.of(KVPrefix)[0], base)
    elif kinds == {Rescale}:
        config, tensors = _factors(adapter.of(Rescale))
    elif kinds <= {LowRank, Shift, Rescale}:
        config, tensors = _low_rank(adapter, base, weights)
    else:
        raise _formless(f"it has {' and '.join(sorted(kind.__name__ for kind in kinds))} at once")
    task = "SEQ_2_SEQ_LM" if base.encoder_decoder else "FEATURE_EXTRACTION" if base.encoder else "CAUSAL_LM"
    common = {"base_model_name_or_path": base.hub_id, "task_type": task, "inference_mode": True}
    return PeftForm(common | config, {name: _narrow(tensor) for name, tensor in tensors.items()})


def _formless(reason: str) -> AdapterError:
    return AdapterError(f"PEFT has no form for this adapter: {reason}. OneBase serves it.", field="path")


def _prompt(virtual: VirtualTokens, base: BaseShape) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    if any(virtual.places):
        raise _formless("its tokens stand among the prompt's, and PEFT puts all in front")
    config = {"peft_type": "PROMPT_TUNING", "prompt_tuning_init": "RANDOM", "num_transformer_submodules": 1}
    config |= _sizes(len(virtual.embeddings), base.hidden, base)
    return config, {"prompt_embeddings": virtual.embeddings}


def _prefix(prefix: KVPrefix, base: BaseShape) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """`prompt_embeddings` as `lowering.prefix` reads them."""
    stored = torch.stack([prefix.keys, prefix.values]).permute(2, 1, 0, 3, 4).flatten(1)
    config = {"peft_type": "PREFIX_TUNING", "prefix_projection": False, "num_transformer_submodules": 1}
    config |= _sizes(prefix.tokens, base.kv_heads * base.head_dim, base)
    return config, {"prompt_embeddings": stored}


def _sizes(tokens: int, width: int, base: BaseShape) -> dict[str, int]:
    return {
        "num_virtual_tokens": tokens,
        "token_dim": width,
        "num_layers": base.layers,
        "num_attention_heads": base.kv_heads,
    }


def _factors(scales: list[Rescale]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    if twice := [site for site, count in Counter(one.site for one in scales).items() if count > 1]:
        raise _formless(f"it rescales {twice[0]} on both sides")
    tensors = {
        f"{_STEM}{one.site}.ia3_l": one.vector[None] if one.side == "input" else one.vector[:, None]
        for one in scales
    }
    inputs = [one.site for one in scales if one.side == "input"]
    sites = [one.site for one in scales]
    return {"peft_type": "IA3", "target_modules": sites, "feedforward_modules": inputs}, tensors


def _low_rank(
    adapter: LoweredAdapter, base: BaseShape, weights: BaseWeights
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    shifts = {one.site: one.vector for one in adapter.of(Shift)}
    outputs = {one.site: one.vector for one in adapter.of(Rescale) if one.side == "output"}
    if any(one.side == "input" for one in adapter.of(Rescale)):
        raise _formless("it rescales inputs beside other changes")
    updates: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for one in adapter.of(LowRank):
        a, b = one.a.float(), one.scale * one.b.float()
        if one.site in updates:
            a, b = torch.cat([updates[one.site][0], a]), torch.cat([updates[one.site][1], b], 1)
        updates[one.site] = a, b
    for site in shifts.keys() | outputs.keys():
        shape = base.sites[site]
        updates.setdefault(site, (torch.zeros(1, shape.in_features), torch.zeros(shape.out_features, 1)))
    tensors: dict[str, torch.Tensor] = {}
    for site, pair in updates.items():
        names = ("lora_embedding_A", "lora_embedding_B") if site == base.embedding else _LINEAR
        tensors |= {f"{_STEM}{site}.{name}": part for name, part in zip(names, pair, strict=True)}
    if outputs:
        tensors |= _magnitudes(updates, outputs, shifts, base, weights)
    elif shifts:
        if base.embedding in updates:
            raise _formless("it trains biases and the embedding at once")
        for site, (_, b) in updates.items():
            tensors[f"{_STEM}{site}.lora_B.bias"] = shifts.get(site, torch.zeros(len(b)))
    ranks = {site: len(a) for site, (a, _) in sorted(updates.items())}
    usual = Counter(ranks.values()).most_common(1)[0][0]
    others = {site: rank for site, rank in ranks.items() if rank != usual}
    config = {
        "peft_type": "LORA",
        "target_modules": list(ranks),
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": others,
        "alpha_pattern": others,
        "lora_bias": bool(shifts) and not outputs,
        "use_dora": bool(outputs),
    }
    return config, tensors


_LINEAR = ("lora_A.weight", "lora_B.weight")


def _magnitudes(
    updates: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    outputs: Mapping[str, torch.Tensor],
    shifts: Mapping[str, torch.Tensor],
    base: BaseShape,
    weights: BaseWeights,
) -> dict[str, torch.Tensor]:
    """DoRA's (Liu et al. 2024, equation 5): the norm that each row of W + B A is brought to. Its factor leaves the
    base's bias as it is, which the engine's does not, so that a shift makes up for it."""
    if base.embedding in updates:
        raise _formless("it rescales outputs beside an update of the embedding")
    found = {}
    for site, (a, b) in updates.items():
        factor = outputs.get(site, torch.ones(len(b)))
        bias = weights.bias(site)
        bias = torch.zeros(len(b)) if bias is None else bias
        left = shifts.get(site, torch.zeros(len(b))) - bias * (1 - factor)
        if left.norm() > _CLOSE * bias.norm():
            raise _formless(f"it rescales the output of {site} and trains its bias")
        found[f"{_STEM}{site}.lora_magnitude_vector"] = factor * (weights.weight(site) + b @ a).norm(dim=1)
    return found


def _narrow(tensor: torch.Tensor) -> torch.Tensor:
    """In bfloat16 where that holds the very numbers."""
    half = tensor.to(torch.bfloat16)
    return (half if torch.equal(half.to(tensor.dtype), tensor) else tensor.float()).contiguous()
