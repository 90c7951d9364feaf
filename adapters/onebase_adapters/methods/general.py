"""Every other weight method of PEFT (LoHa, LoKr, VeRA, OFT, ...): its change of each weight matrix, factorised.

PEFT itself merges the adapter into copies of the base's weights; what changed is low-rank exactly, or is cut to the
largest singular values with its error reported, or is refused.
"""

import re
from collections.abc import Iterable, Mapping

import torch
from torch import nn

from onebase_adapters.errors import AdapterFormatError, AdapterMismatchError
from onebase_adapters.factorise import factorise
from onebase_adapters.methods.source import Lowered, Source

MOST_RANK = 128
"""A larger rank would cost more than merging the adapter into a base of its own."""
MOST_ERROR = 0.05
"""Relative error, in the Frobenius norm over all sites together, above which an adapter is refused."""


def lower(source: Source) -> Lowered:
    """One LowRank for each site whose weight the method changes."""
    sites = [name for name in source.base.sites if any(key.startswith(f"{name}.") for key in source.tensors)]
    if not sites:
        raise AdapterMismatchError(f"No tensor belongs to a linear site of {source.base.name}.", field="path")
    updates, lost, total = [], 0.0, 0.0
    for name, delta in _changes(source, sites):
        update = factorise(name, delta, MOST_RANK)
        if update is None:
            continue
        updates.append(update)
        total += float(delta.square().sum())
        lost += float((delta - update.b @ update.a).square().sum())
    error = (lost / total) ** 0.5 if total else 0.0
    method = source.config["peft_type"]
    if error > MOST_ERROR:
        raise AdapterFormatError(
            f"{method} changes the weights by matrices that rank {MOST_RANK} cannot hold: the relative error would "
            f"be {error:.1%}, more than {MOST_ERROR:.0%}. Merge it into the base and serve that.",
            field="peft_type",
        )
    rank = max((update.rank for update in updates), default=0)
    return Lowered(tuple(updates), (f"{method} as LowRank up to rank {rank}, relative error {error:.2g}",))


def _changes(source: Source, sites: list[str]) -> Iterable[tuple[str, torch.Tensor]]:
    """Each site's change [out, in], as PEFT merges it into a float32 copy of the base's weights."""
    from peft import PeftConfig, get_peft_model, set_peft_model_state_dict

    unwanted = ("auto_mapping", "base_model_name_or_path", "layers_to_transform", "layers_pattern", "task_type")
    settings = {key: value for key, value in source.config.items() if key not in unwanted}
    names = "|".join(re.escape(site) for site in sites)
    settings |= {"target_modules": names, "inference_mode": True}
    try:
        config = PeftConfig.from_peft_type(**settings)
        model = get_peft_model(_skeleton(source, sites), config)
        outcome = set_peft_model_state_dict(model, dict(_stored_names(source.tensors, sites)))
    except (TypeError, ValueError, KeyError, RuntimeError, AttributeError, NotImplementedError) as error:
        raise AdapterFormatError(f"PEFT cannot read this adapter: {error}", field="path") from error
    if outcome.unexpected_keys:
        raise AdapterFormatError(f"Tensor {outcome.unexpected_keys[0]!r} belongs to no site.", field="path")
    for site in sites:
        layer = model.base_model.model.get_submodule(site)
        if not hasattr(layer, "merge"):
            raise AdapterFormatError(
                f"{source.config['peft_type']} has no merged form: it is not served.", field="peft_type"
            )
        before = layer.get_base_layer().weight.detach().clone()
        layer.merge()
        yield site, layer.get_base_layer().weight.detach() - before


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
        linear = nn.Linear(site.in_features, site.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(source.weights.weight(name), requires_grad=False)
        module.add_module(leaf, linear)
    return root
