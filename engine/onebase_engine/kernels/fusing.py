"""What the fused decoders of all devices share: which models they run, those models' layers with their tables, and
rotary angles. A fused decoder runs on the transformers model's own weights and leaves its modules in place, as the
definition to test against."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from onebase_adapters.base_shape import BaseShape
from onebase_engine.kernels import decoder_families as families
from onebase_engine.kernels.adapter_interface import AdapterKernels, KeyValuePages
from onebase_engine.kernels.site_tables import SiteTables
from onebase_engine.kernels.tables import BottleneckTable

log = logging.getLogger(__name__)

_LEAST_ANGLES = 2048
"""Positions whose angles are computed at first."""


@dataclass(frozen=True)
class LayerToFuse:
    """One of transformers' layers, and what its adapters are kept in."""

    layer: Any
    before: Any
    """The layer whose output it reads, None for the first."""
    kind: families.Kind
    projections: list[tuple[list[Any], SiteTables]]
    """The linear modules of each that share an input, in the kind's order, and their tables."""
    bottlenecks: list[BottleneckTable]
    """Behind attention, and behind the MLP."""


def kind_of(model: Any) -> families.Kind:
    """How a model that may be fused differs from Llama."""
    return families.MODELS[type(model).__name__]


def layers_to_fuse(
    model: Any, shape: BaseShape, kernels: AdapterKernels, slots: int, device: torch.device
) -> list[LayerToFuse]:
    """The layers of a model that may be fused, with new tables."""
    kind, layers = kind_of(model), []
    for index, layer in enumerate(model.model.layers):
        projections = []
        for owner, names in kind.projections:
            sites = [shape.sites[f"model.layers.{index}.{owner}.{name}"] for name in names]
            modules = [layer.get_submodule(f"{owner}.{name}") for name in names]
            projections.append((modules, SiteTables(sites, slots, kernels, device)))
        bottlenecks = [
            BottleneckTable(f"model.layers.{index}.{owner}", slots, device, transposed=kernels.TRANSPOSED_DOWN)
            for owner in ("self_attn", "mlp")
        ]
        before = model.model.layers[index - 1] if index else None
        layers.append(LayerToFuse(layer, before, kind, projections, bottlenecks))
    return layers


def sites_of(layers: Sequence[LayerToFuse]) -> list[SiteTables]:
    """All layers' tables of linear sites."""
    return [tables for each in layers for _, tables in each.projections]


def sublayers_of(layers: Sequence[LayerToFuse]) -> list[BottleneckTable]:
    """All layers' tables of sublayers."""
    return [table for each in layers for table in each.bottlenecks]


class Angles:
    """The rotary embedding's cosines and sines by position, computed once by transformers' own module."""

    def __init__(self, rotary: Any, layer_type: str | None) -> None:
        """`layer_type`: whose, where a model's layers have several."""
        self._rotary = rotary if layer_type is None else partial(rotary, layer_type=layer_type)
        self._known = 0

    @staticmethod
    def layer_type(rotary: Any, attention: Any) -> str | None:
        """Which of the model's rotations a layer takes; None where there is one."""
        return attention.layer_type if isinstance(rotary.rope_type, dict) else None

    @staticmethod
    def fit(rotary: Any, dim: int) -> bool:
        """Whether they are for whole heads, and depend on the position alone: in other kinds also on how long the
        longest sequence is."""
        several = rotary.rope_type if isinstance(rotary.rope_type, dict) else {None: rotary.rope_type}
        frequencies = [getattr(rotary, f"{kind}_inv_freq" if kind else "inv_freq") for kind in several]
        return {*several.values()} <= {"default", "linear", "llama3", "yarn"} and all(
            2 * len(each) == dim for each in frequencies
        )

    def __call__(self, positions: np.ndarray, like: torch.Tensor) -> tuple[int, int]:
        """Addresses of [positions, dim] in the dtype of `like`, as far as these positions."""
        if (last := int(positions.max())) >= self._known:
            self._known = max(_LEAST_ANGLES, 1 << last.bit_length())
            self._cos, self._sin = self._rotary(like, torch.arange(self._known)[None])
        return self._cos.data_ptr(), self._sin.data_ptr()


Fits = Callable[[Sequence[nn.Module]], bool]
"""Whether a product takes linear modules that share an input, as one."""


def may_be_fused(model: Any, cache: KeyValuePages, fits: Fits) -> bool:
    """Whether it is exact for this model; if not, the log says why."""
    lacking = _lacking(model, cache, fits)
    if lacking is not None:
        log.info("%s keeps transformers' own layers: %s", type(model).__name__, lacking)
    return lacking is None


def _lacking(model: Any, cache: KeyValuePages, fits: Fits) -> str | None:
    if type(model).__name__ not in families.MODELS:
        return f"fused ones are known for {', '.join(families.MODELS)}"
    if not Angles.fit(model.model.rotary_emb, cache.dim):
        return "its rotary embedding depends on the longest sequence, or turns a part of each head"
    config = model.config
    wanted = "gelu_pytorch_tanh" if kind_of(model).gelu else "silu"
    if (found := getattr(config, "hidden_activation", None) or config.hidden_act) != wanted:
        return f"the fused ones have {wanted}, not {found}"
    if getattr(config, "attn_logit_softcapping", None) or getattr(config, "use_bidirectional_attention", None):
        return "the fused ones have no soft cap on scores, and look back only"
    if not all(_fusable(layer, kind_of(model), fits) for layer in model.model.layers):
        return "the fused ones take bfloat16 with linear modules in 4 bits, in sizes that pack, alike side by side"
    return None


def window_of(attention: Any) -> int | None:
    """How far back a layer sees: where layers may differ, each knows its own."""
    owner = attention if hasattr(attention, "sliding_window") else attention.config
    return getattr(owner, "sliding_window", None) or None


def _fusable(layer: Any, kind: families.Kind, fits: Fits) -> bool:
    together = [[layer.get_submodule(f"{owner}.{name}") for name in names] for owner, names in kind.projections]
    return all(fits(modules) for modules in together) and layer.input_layernorm.weight.dtype == torch.bfloat16
