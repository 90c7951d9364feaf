"""Every other weight method of PEFT (LoHa, LoKr, VeRA, OFT, ...): its change of each weight matrix, factorised.

PEFT itself merges the adapter into copies of the base's weights; what changed is low-rank exactly, or is cut to the
largest singular values with its error reported, or is refused.
"""

import copy
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from onebase_adapters.errors import AdapterFormatError, AdapterMismatchError
from onebase_adapters.factorise import factorise
from onebase_adapters.lowering.source import Lowered, Source
from onebase_adapters.primitives.instruction_set import LowRank, Shift

MOST_RANK = 128
"""A larger rank would cost more than merging the adapter into a base of its own."""
MOST_ERROR = 0.05
"""Relative error, in the Frobenius norm over all sites together, above which an adapter is refused."""
_MERGED, _ROUNDING = 1e-3, 1e-5
"""How far a merged layer may be off, of its change and of its output."""


def lower(source: Source) -> Lowered:
    """One LowRank for each site whose weight the method changes, a Shift where it changes the bias."""
    method = source.config["peft_type"]
    primitives: list[LowRank | Shift] = []
    lost, total = 0.0, 0.0
    for name, change in _changes(source):
        update = factorise(name, change.weight, MOST_RANK)
        if update is not None:
            primitives.append(update)
            total += float(change.weight.square().sum())
            lost += float((change.weight - update.b @ update.a).square().sum())
        if change.bias is not None and bool(change.bias.any()):
            primitives.append(Shift(name, change.bias))
    error = (lost / total) ** 0.5 if total else 0.0
    if error > MOST_ERROR:
        raise AdapterFormatError(
            f"{method} changes the weights by matrices that rank {MOST_RANK} cannot hold: the relative error would "
            f"be {error:.1%}, more than {MOST_ERROR:.0%}. Merge it into the base and serve that.",
            field="peft_type",
        )
    rank = max((part.rank for part in primitives if isinstance(part, LowRank)), default=0)
    return Lowered(tuple(primitives), (f"{method} as LowRank up to rank {rank}, relative error {error:.2g}",))


@dataclass(frozen=True)
class _Change:
    """The change that merging an adapter makes to a site, float32."""

    weight: torch.Tensor
    """[out, in]"""
    bias: torch.Tensor | None
    """[out], where the site has one."""


def _changes(source: Source) -> Iterable[tuple[str, _Change]]:
    """Each site's change, as PEFT merges it into a float32 copy of the base's weights."""
    from peft import PeftConfig, get_peft_model, set_peft_model_state_dict

    unwanted = ("auto_mapping", "base_model_name_or_path", "task_type")
    settings = {key: value for key, value in source.config.items() if key not in unwanted}
    with _peft_reads():
        config: Any = PeftConfig.from_peft_type(**settings)
        sites = _sites(source, config)
        config.target_modules = "|".join(re.escape(site) for site in sites)
        config.layers_to_transform, config.inference_mode = None, True
        model = get_peft_model(_skeleton(source, sites), config).eval()
        outcome = set_peft_model_state_dict(model, dict(_stored_names(source.tensors, sites)))
    if outcome.unexpected_keys:
        raise AdapterFormatError(f"Tensor {outcome.unexpected_keys[0]!r} belongs to no site.", field="path")
    if missing := _unread(model, set(outcome.missing_keys)):
        raise AdapterFormatError(f"Tensor {missing!r} is missing.", field="path")
    for site in sites:
        yield site, _merged(source, site, model.base_model.model.get_submodule(site))


@contextmanager
def _peft_reads() -> Iterator[None]:
    """Turn what PEFT raises of a configuration or tensors that it does not understand into AdapterFormatError."""
    try:
        yield
    except (ImportError, LookupError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise AdapterFormatError(f"PEFT cannot read this adapter: {error}", field="path") from error


def _sites(source: Source, config: Any) -> list[str]:
    """The sites that have tensors; where all share one vector (Uni-LoRA), those that the configuration names."""
    from peft.tuners.tuners_utils import check_target_module_exists

    known = source.base.sites
    sites = [name for name in known if any(key.startswith(f"{name}.") for key in source.tensors)]
    sites = sites or [name for name in known if check_target_module_exists(config, name)]
    if not sites:
        raise AdapterMismatchError(f"No tensor belongs to a linear site of {source.base.name}.", field="path")
    return sites


def _unread(model: nn.Module, missing: set[str]) -> str | None:
    """A parameter of the adapter that no tensor has filled, under any of its names: PEFT only warns of these."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    read = {id(parameter) for name, parameter in parameters.items() if name not in missing}
    names = (name for name, parameter in parameters.items() if id(parameter) not in read)
    return next((name for name in names if ".base_layer." not in name), None)


def _merged(source: Source, name: str, layer: Any) -> _Change:
    """Return the change that `merge` makes to the site. Refuses a layer that computes otherwise once merged."""
    x = torch.randn(4, source.site(name).in_features, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), _peft_reads():
        before = copy.deepcopy(layer.get_base_layer())
        wanted = layer(x)
        layer.merge()
        merged = layer.get_base_layer()
        found, change = merged(x), merged(x) - before(x)
        bias = None if before.bias is None else merged.bias - before.bias
    if (found - wanted).norm() > _MERGED * change.norm() + _ROUNDING * wanted.norm():
        raise AdapterFormatError(
            f"{source.config['peft_type']} at {name!r} does not compute what its merged weights do: its change "
            "depends on the token, or is drawn anew each time. It is not served.",
            field="peft_type",
        )
    return _Change(merged.weight.detach() - before.weight, bias)


def _stored_names(tensors: Mapping[str, torch.Tensor], sites: list[str]) -> Iterable[tuple[str, torch.Tensor]]:
    """PEFT's own names again: what belongs to no site is shared by all, and kept by the tuner."""
    for name, tensor in tensors.items():
        of_a_site = any(name.startswith(f"{site}.") for site in sites)
        yield f"base_model.model.{name}" if of_a_site else f"base_model.{name}", tensor


def _skeleton(source: Source, sites: list[str]) -> nn.Module:
    """A module that has nothing but the sites, under their names."""
    root = nn.Module()
    for name in sites:
        parent, _, leaf = name.rpartition(".")
        module = root
        for part in parent.split(".") if parent else []:
            if not hasattr(module, part):
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        site = source.base.sites[name]
        bias = source.weights.bias(name)
        linear = nn.Linear(site.in_features, site.out_features, bias=bias is not None, device="meta")
        linear.weight = nn.Parameter(source.weights.weight(name), requires_grad=False)
        if bias is not None:
            linear.bias = nn.Parameter(bias.clone(), requires_grad=False)
        module.add_module(leaf, linear)
    return root
