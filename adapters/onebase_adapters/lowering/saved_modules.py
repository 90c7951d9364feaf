"""Parts that an adapter of any method may carry beside its own tensors: a head, replaced modules, trained biases,
retrained tokens."""

from typing import Any

import torch

from onebase_adapters.errors import AdapterFormatError, AdapterMismatchError
from onebase_adapters.lowering.retrained_tokens import retrained_tokens
from onebase_adapters.lowering.source import Source
from onebase_adapters.primitives.instruction_set import Head, LowRank, Primitive, Shift

_HEADS = ("score", "classifier")
"""Names that transformers gives to the classifier of its sequence and token classification models."""


def split_saved(source: Source) -> tuple[tuple[Primitive, ...], Source]:
    """The primitives of the saved modules, and what is left for the method."""
    # PEFT writes an embedding's untouched weights beside its LoRA matrices.
    taken = {name for name in source.tensors if name.endswith(".base_layer.weight")}
    rows, named = retrained_tokens(source)
    primitives: list[Primitive] = [*rows]
    taken |= named
    if (head := _head(source)) is not None:
        primitives.append(head)
        taken |= {f"{module}.{leaf}" for module in _HEADS for leaf in ("weight", "bias")}
    for name, tensor in source.tensors.items():
        module, _, leaf = name.rpartition(".")
        module = module.removesuffix(".base_layer") if leaf == "bias" else module  # of a site that is adapted, too
        if leaf == "weight" and module == source.base.embedding:
            primitives.append(_replaced_embedding(source, module, name))
        elif leaf == "weight" and module in source.base.sites:
            primitives.append(_replaced_linear(source, module, name))
        elif leaf == "bias" and module in source.base.sites:
            before = source.weights.bias(module)
            primitives.append(Shift(module, tensor.float() - (0 if before is None else before)))
        else:
            continue
        taken.add(name)
    return tuple(primitives), source.without(taken)


def _replaced_linear(source: Source, module: str, name: str) -> LowRank:
    """y = W' x as W x + (W' - W) x: exact, of full rank."""
    site = source.base.sites[module]
    delta = source.take(name, (site.out_features, site.in_features)) - source.weights.weight(module)
    if site.in_features <= site.out_features:
        return LowRank(module, torch.eye(site.in_features), delta, 1.0)
    return LowRank(module, delta, torch.eye(site.out_features), 1.0)


def _replaced_embedding(source: Source, module: str, name: str) -> LowRank:
    base = source.base
    if (rows := len(source.tensors[name])) != base.vocab:
        raise AdapterMismatchError(
            f"The adapter brings an embedding of {rows} tokens, and the base has {base.vocab}: "
            "it was trained with tokens of its own, which are not served. Train it without new tokens.",
            field="path",
        )
    delta = source.take(name, (base.vocab, base.hidden)) - source.weights.weight(module)
    return LowRank(module, delta.t(), torch.eye(base.hidden), 1.0)


def _head(source: Source) -> Head | None:
    module = next((module for module in _HEADS if f"{module}.weight" in source.tensors), None)
    task = str(source.config.get("task_type") or "")
    notes: Any = source.sidecar.get("head")
    if module is None:
        if notes or task in ("SEQ_CLS", "TOKEN_CLS"):
            raise AdapterFormatError(
                "A classification adapter without its head: tensor 'score.weight' is missing.", field="path"
            )
        return None
    if not isinstance(notes, dict) or not isinstance(notes.get("labels"), list):
        raise AdapterFormatError(
            'The head has no labels: write {"head": {"kind": "sequence", "pooling": "last", "labels": [...]}} into '
            "onebase.json beside the weights.",
            field="labels",
        )
    labels = tuple(str(label) for label in notes["labels"])
    kind, pooling = notes.get("kind", "sequence"), notes.get("pooling", "last")
    if kind not in ("sequence", "token") or pooling not in ("first", "last", "mean"):
        raise AdapterFormatError(
            f"onebase.json: head kind {kind!r} with pooling {pooling!r} is not known; kinds are sequence, token; "
            "poolings first, last and mean.",
            field="head",
        )
    weight = source.take(f"{module}.weight", (len(labels), source.base.hidden))
    if f"{module}.bias" in source.tensors:
        bias = source.take(f"{module}.bias", (len(labels),))
    else:
        bias = torch.zeros(len(labels))
    return Head(kind, pooling, weight, bias, labels)
