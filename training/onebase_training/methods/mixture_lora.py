"""LoRA on a mixture of experts: trained as a layer of PEFT's for each matrix of each expert, and stored as PEFT
stores an update of transformers' stacked parameters, which it reads there as `target_parameters`.

A holds the experts' rows one expert after another, B their columns rank by rank.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import torch
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file

from onebase_adapters.errors import ConfigError, did_you_mean
from onebase_adapters.formats.peft_folder import CONFIG_FILE, WEIGHTS_FILE
from onebase_adapters.lowering.experts import split_experts
from onebase_adapters.lowering.source import Source, canonical_names
from onebase_contract.settings import TrainConfig
from onebase_engine.base.load_base import LoadedBase
from onebase_engine.base.mixture import Mixture
from onebase_engine.base.model_weights import ModelWeights
from onebase_training.methods.peft_parts import BASE_PREFIX

_EXPERT = re.compile(r"\.experts\.\d+\.")
_STORED = re.compile(
    rf"^{re.escape(BASE_PREFIX)}(?P<experts>.+\.experts)\.(?P<number>\d+)\.(?P<matrix>\w+)\.lora_(?P<part>[AB])\.weight$"
)


def routed_sites(base: LoadedBase) -> set[str]:
    """The routers' and the experts' sites: parameters in transformers, and no modules."""
    mixtures = tuple(f"{name}." for name, module in base.model.named_modules() if isinstance(module, Mixture))
    return {site for site in base.shape.sites if site.startswith(mixtures)}


def _parameter(site: str) -> str:
    """The name that transformers has for what is a site here: `mlp.experts.gate_up_proj`, `mlp.gate.weight`."""
    return _EXPERT.sub(".experts.", site) if _EXPERT.search(site) else f"{site}.weight"


def mixture_targets(base: LoadedBase, config: TrainConfig) -> list[str]:
    """Names of the sites that get an update: those of attention, routers and experts, or what `config.targets`
    says, in transformers' names. A dense layer of such a model is left out, as PEFT takes its modules' names for
    the experts' of older adapters. Raises ConfigError."""
    head = base.model.get_output_embeddings()
    routed = routed_sites(base)
    sites = [name for name in base.shape.sites if base.model.get_submodule(name) is not head]
    if not config.targets:
        chosen = [name for name in sites if ".mlp." not in name or name in routed]
    else:
        names = {name: (name, _parameter(name), _parameter(name).removesuffix(".weight")) for name in sites}
        for target in config.targets:
            if not any(_ends(target, own) for own in names.values()):
                known = {own.rpartition(".")[2] for _, _, own in names.values()}
                raise ConfigError(
                    f"No module of {base.shape.name} is called {target!r}{did_you_mean(target, known)}. There are "
                    f"{', '.join(sorted(known))}.",
                    field="targets",
                )
        chosen = [name for name, own in names.items() if any(_ends(target, own) for target in config.targets)]
    if config.dropout and not routed.isdisjoint(chosen):
        raise ConfigError("PEFT has no dropout on a mixture's router and experts: leave it at 0.", field="dropout")
    for field in ("rank_pattern", "alpha_pattern"):
        _check_patterns(getattr(config, field), field, routed.intersection(chosen))
    return chosen


def _ends(target: str, names: Iterable[str]) -> bool:
    return any(name == target or name.endswith(f".{target}") for name in names)


def _check_patterns(patterns: Mapping[str, Any], field: str, sites: Iterable[str]) -> None:
    """PEFT will ask for a parameter's name: it must find what held for the modules."""
    keys = list(patterns)
    for site in sites:
        if patterns.get(get_pattern_key(keys, site)) != patterns.get(get_pattern_key(keys, _parameter(site))):
            raise ConfigError(
                f"{field} must hold for all experts alike: a pattern for {site!r} has to match "
                f"{_parameter(site)!r}, too, and no expert alone.",
                field=field,
            )


def save_stacked(base: LoadedBase, targets: Sequence[str], save: Callable[[Path], None]) -> Callable[[Path], None]:
    """`save`, and then the experts' tensors and the targets' names as PEFT has them."""

    def stacked(folder: Path) -> None:
        save(folder)
        tensors = _stack(load_file(folder / WEIGHTS_FILE))
        save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        settings = json.loads((folder / CONFIG_FILE).read_text())
        chosen, routed = set(targets), routed_sites(base)
        settings["target_modules"] = _shortened(chosen - routed, base.shape.sites.keys() - routed, parts=1)
        parameters, all_parameters = ({_parameter(site) for site in sites} for sites in (chosen & routed, routed))
        settings["target_parameters"] = _shortened(parameters, all_parameters, parts=2)
        (folder / CONFIG_FILE).write_text(json.dumps(settings, indent=2))

    return stacked


def _stack(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    made: dict[str, torch.Tensor] = {}
    found: dict[str, dict[str, dict[str, dict[int, torch.Tensor]]]] = {}
    for name, value in tensors.items():
        if (match := _STORED.match(name)) is None:
            made[name] = value
            continue
        parts = found.setdefault(match["experts"], {}).setdefault(match["matrix"], {})
        parts.setdefault(match["part"], {})[int(match["number"])] = value
    for experts, matrices in found.items():
        # PEFT wraps the parameters in the order that they have in the module, one in another.
        for depth, matrix in enumerate(sorted(matrices)):
            module = BASE_PREFIX + experts + ".base_layer" * depth
            a, b = ([value for _, value in sorted(matrices[matrix][part].items())] for part in ("A", "B"))
            made[f"{module}.lora_A.weight"] = torch.cat(a)
            made[f"{module}.lora_B.weight"] = torch.stack(b, -1).flatten(1)
    return {name: value.contiguous() for name, value in made.items()}


def _shortened(names: Set[str], of: Set[str], *, parts: int) -> list[str]:
    """The names by their last so many parts, where all that end so are meant."""

    def end(name: str) -> str:
        return ".".join(name.split(".")[-parts:])

    others = {end(name) for name in of - names}
    return sorted({name if end(name) in others else end(name) for name in names})


def load_stacked(
    base: LoadedBase, load: Callable[[Mapping[str, torch.Tensor]], None]
) -> Callable[[Mapping[str, torch.Tensor]], None]:
    """`load`, of a stored adapter's tensors in either form that PEFT has for experts."""

    def apart(tensors: Mapping[str, torch.Tensor]) -> None:
        named = canonical_names(tensors, base.shape)
        updates, rest = split_experts(Source({}, named, {}, base.shape, ModelWeights(base.model)))
        parts = {f"{BASE_PREFIX}{name}": value for name, value in rest.tensors.items()}
        for update in updates:
            parts[f"{BASE_PREFIX}{update.site}.lora_A.weight"] = update.a
            parts[f"{BASE_PREFIX}{update.site}.lora_B.weight"] = update.b
        load(parts)

    return apart
