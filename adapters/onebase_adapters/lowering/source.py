"""The input and the result of a method's lowering."""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from onebase_adapters.base_shape import BaseShape, Site
from onebase_adapters.errors import AdapterFormatError, AdapterMismatchError
from onebase_adapters.primitives.instruction_set import Primitive

_PREFIX = re.compile(r"^base_model\.(?:model\.)?")
_WRAPPERS = re.compile(r"(?:(?<=\.)|^)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|module)\.")
_ADAPTER = re.compile(r"(\.lora_(?:A|B|embedding_A|embedding_B|magnitude_vector))\.[^.]+(?=\.(?:weight|bias)$)")
"""The name under which PEFT held the adapter, before a leaf."""


class BaseWeights(Protocol):
    """The base's own weights as they are served (4-bit ones dequantised), float32 on the CPU."""

    def weight(self, site: str) -> torch.Tensor:
        """[out_features, in_features] of a linear site, [vocab, hidden] of the embedding."""
        ...

    def bias(self, site: str) -> torch.Tensor | None:
        """[out_features], if the site has one."""
        ...


@dataclass(frozen=True)
class Source:
    """An adapter as stored, and the base that it is lowered for."""

    config: Mapping[str, Any]
    tensors: Mapping[str, torch.Tensor]
    """By PEFT's names, without `base_model.model.` and the adapter's name in them."""
    sidecar: Mapping[str, Any]
    base: BaseShape
    weights: BaseWeights

    def without(self, names: set[str]) -> "Source":
        """The same, without some tensors."""
        return replace(self, tensors={k: v for k, v in self.tensors.items() if k not in names})

    def task(self, count: int) -> int:
        """Which of `count` tasks that were trained together this adapter is served for. Raises AdapterFormatError.

        With PEFT a caller says so with every batch; here each task is an adapter of its own.
        """
        task = self.sidecar.get("task", 0 if count == 1 else None)
        if type(task) is not int or not 0 <= task < count:
            raise AdapterFormatError(
                f'The adapter holds {count} tasks: write {{"task": N}}, N from 0 to {count - 1}, into onebase.json '
                "beside the weights, and register a copy of the folder for each task that is to be served.",
                field="task",
            )
        return task

    def take(self, name: str, shape: tuple[int | None, ...]) -> torch.Tensor:
        """A tensor in float32; None in `shape` is any size.

        Raises AdapterFormatError (missing) or AdapterMismatchError (another shape).
        """
        tensor = self.tensors.get(name)
        if tensor is None:
            raise AdapterFormatError(f"Tensor {name!r} is missing.", field="path")
        fits = tensor.dim() == len(shape) and all(
            want is None or want == have for want, have in zip(shape, tensor.shape, strict=True)
        )
        if not fits:
            wanted = " x ".join("any" if size is None else str(size) for size in shape)
            raise AdapterMismatchError(
                f"Tensor {name!r} is {' x '.join(map(str, tensor.shape))}; this base needs {wanted}.", field="path"
            )
        return tensor.float()

    def site(self, name: str) -> Site:
        """A linear site of the base. Raises AdapterMismatchError."""
        site = self.base.sites.get(name)
        if site is None:
            raise AdapterMismatchError(f"Base {self.base.name} has no linear site {name!r}.", field="path")
        return site

    def refuse_others(self, known: set[str]) -> None:
        """Raise AdapterFormatError if there are tensors that the method does not know: nothing is ignored."""
        if others := sorted(self.tensors.keys() - known):
            refuse_norm(others[0])
            raise AdapterFormatError(
                f"Tensor {others[0]!r} is not known to {self.config.get('peft_type')} adapters.", field="path"
            )


def refuse_norm(name: str) -> None:
    """Raise AdapterFormatError if the tensor is a norm's."""
    module, _, leaf = name.rpartition(".")
    if leaf in ("weight", "bias") and "norm" in module.rpartition(".")[2].lower():
        raise AdapterFormatError(
            f"The adapter brings a trained norm, {module!r}, which is not served: train without it in "
            "modules_to_save, or merge the adapter and serve the model as a base.",
            field="modules_to_save",
        )


@dataclass(frozen=True)
class Lowered:
    """A method's result."""

    primitives: tuple[Primitive, ...]
    notes: tuple[str, ...] = ()


Lower = Callable[[Source], Lowered]
"""Raises AdapterFormatError (bad files) or AdapterMismatchError (wrong base)."""


def canonical_names(tensors: Mapping[str, torch.Tensor], base: BaseShape) -> dict[str, torch.Tensor]:
    """PEFT's stored names, from the base's own site on, without what wrapped the model and the adapter's name.

    A model within another has its sites under other names (`layers.0` for `model.layers.0`, or `language_model.`
    before it): the base's site is meant if one alone ends so.
    """
    sites = {*base.sites, base.embedding, *base.sublayers}
    ends: dict[str, set[str]] = {}
    for site in sites:
        parts = site.split(".")
        for start in range(1, len(parts)):
            if any(part.isdigit() for part in parts[start:]):
                ends.setdefault(".".join(parts[start:]), set()).add(site)
    return {_canonical(name, sites, ends): tensor for name, tensor in tensors.items()}


def _canonical(name: str, sites: Collection[str], ends: Mapping[str, set[str]]) -> str:
    name = _WRAPPERS.sub("", _ADAPTER.sub(r"\1", _PREFIX.sub("", name))).replace(".default.", ".")
    name = name.replace(".block_sparse_moe.", ".mlp.")  # Mixtral's name of it before transformers 5
    parts = name.split(".")
    for start in range(len(parts)):
        for end in range(len(parts), start, -1):
            path, rest = ".".join(parts[start:end]), parts[end:]
            found = {path} if path in sites else ends.get(path, set())
            if len(found) == 1:
                return ".".join([*found, *rest])
    return name
