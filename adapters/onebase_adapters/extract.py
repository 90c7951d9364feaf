"""A fully fine-tuned model minus its base, as a low-rank adapter: so that it is served beside the others.

Each site's difference is cut to its largest singular values. Where a norm in front of sites was trained too, what
it changed is moved into their weights, which is exact before the cut: W' diag(g') x = (W' diag(g'/g)) diag(g) x.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from onebase_adapters.atomic_files import staged_directory
from onebase_adapters.base_shape import BaseShape
from onebase_adapters.errors import AdapterMismatchError, ConfigError
from onebase_adapters.factorise import factorise
from onebase_adapters.formats.peft_folder import CONFIG_FILE, SIDECAR_FILE, WEIGHTS_FILE
from onebase_adapters.lowering.source import BaseWeights

_NORMS = (
    ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
)
"""Norms of the Llama kind, and the sites that read what they give."""


@dataclass(frozen=True)
class FullModel:
    """A model with all of its weights, in bfloat16 or wider."""

    module: nn.Module
    weights: BaseWeights

    @property
    def sizes(self) -> dict[str, torch.Size]:
        """The shapes of its parameters, by name."""
        return {name: parameter.shape for name, parameter in self.module.named_parameters()}


@dataclass(frozen=True)
class Extraction:
    """The outcome of an extraction."""

    sites: int
    rank: int
    error: float
    """Relative, in the Frobenius norm over all sites together."""
    untouched: tuple[str, ...]
    """Parameters that were trained but that no low-rank update can carry."""


def extract(before: FullModel, after: FullModel, shape: BaseShape, output: Path, *, rank: int) -> Extraction:
    """Write the difference between a base of `shape` and its fine-tune as a LoRA folder for PEFT and for us.

    Raises ConfigError (output exists), AdapterMismatchError (another architecture) or StorageError.
    """
    if output.exists():
        raise ConfigError(f"{output} exists. Choose another output.", field="output")
    if before.sizes != after.sizes:
        raise AdapterMismatchError(f"It is not a fine-tune of {shape.name}: other layers or sizes.", field="path")
    tensors: dict[str, torch.Tensor] = {}
    lost = total = 0.0
    for site, change in _changes(before, after, shape):
        update = factorise(site, change, rank)
        if update is None:
            continue
        infix = "embedding_" if site == shape.embedding else ""
        leaf = "" if infix else ".weight"
        tensors[f"base_model.model.{site}.lora_{infix}A{leaf}"] = update.a.contiguous()
        tensors[f"base_model.model.{site}.lora_{infix}B{leaf}"] = update.b.contiguous()
        total += float(change.square().sum())
        lost += float((change - update.b @ update.a).square().sum())
    sites = len(tensors) // 2
    result = Extraction(
        sites, rank, (lost / total) ** 0.5 if total else 0.0, tuple(_untouched(before, after, shape))
    )
    _write(output, tensors, shape, result)
    return result


def _changes(before: FullModel, after: FullModel, shape: BaseShape) -> Iterator[tuple[str, torch.Tensor]]:
    """Each site's difference [out, in], float32."""
    old, new = before.weights, after.weights
    factors = dict(_norm_factors(before, after, shape))
    for site in [*shape.sites, shape.embedding]:
        weight = new.weight(site)
        if site in factors:
            weight = weight * factors[site]
        change = weight - old.weight(site)
        # The embedding is stored by token; as an update its input is one-hot, so [hidden, vocab].
        yield site, change.t() if site == shape.embedding else change


def _norm_factors(before: FullModel, after: FullModel, shape: BaseShape) -> Iterator[tuple[str, torch.Tensor]]:
    """By site: how much more its fine-tuned norm scales its input [in_features]."""
    for norm, sites in _norms(before, shape):
        old, new = (model.module.get_parameter(f"{norm}.weight").detach().float() for model in (before, after))
        if not torch.equal(old, new) and bool((old != 0).all()):
            for site in sites:
                yield site, new / old


def _norms(model: FullModel, shape: BaseShape) -> Iterator[tuple[str, list[str]]]:
    names = {name for name, _ in model.module.named_modules()}
    for layer in range(shape.layers):
        for norm, sites in _NORMS:
            path = f"model.layers.{layer}"
            followers = [f"{path}.{site}" for site in sites]
            if f"{path}.{norm}" in names and all(site in shape.sites for site in followers):
                yield f"{path}.{norm}", followers
    if "model.norm" in names and "lm_head" in shape.sites:
        yield "model.norm", ["lm_head"]


def _untouched(before: FullModel, after: FullModel, shape: BaseShape) -> Iterator[str]:
    """Names of changed parameters that are neither a site's weight nor a norm moved into one."""
    carried = {f"{site}.weight" for site in [*shape.sites, shape.embedding]}
    carried |= {f"{norm}.weight" for norm, _ in _norms(before, shape)}
    changed = dict(after.module.named_parameters())
    for name, parameter in before.module.named_parameters():
        if name not in carried and not torch.equal(parameter, changed[name]):
            yield name


def _write(output: Path, tensors: dict[str, torch.Tensor], shape: BaseShape, result: Extraction) -> None:
    ranks = {name.removeprefix("base_model.model.").split(".lora_")[0]: min(t.shape) for name, t in tensors.items()}
    targets = sorted({site.rpartition(".")[2] for site in ranks})
    # The scale stays 1 where a site has less to say than the rank allows.
    lower = {site: rank for site, rank in ranks.items() if rank < result.rank}
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": shape.hub_id, "r": result.rank,
        "lora_alpha": result.rank, "lora_dropout": 0.0, "bias": "none", "target_modules": targets,
        "inference_mode": True, "rank_pattern": lower, "alpha_pattern": lower,
    }  # fmt: skip
    notes = {
        "base": {"model": shape.name, "fingerprint": shape.fingerprint, "quantization": "none"},
        "method": "extracted",
        "extraction": {"rank": result.rank, "relative_error": result.error, "untouched": list(result.untouched)},
    }
    with staged_directory(output) as staged:
        save_file(tensors, staged / WEIGHTS_FILE)
        (staged / CONFIG_FILE).write_text(json.dumps(config, indent=2))
        (staged / SIDECAR_FILE).write_text(json.dumps(notes, indent=2))
