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
    turned: int
    """How many numbers of each head are rotated, from the first."""
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
    (turned,) = Angles.turned(model.model.rotary_emb)
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
        layers.append(LayerToFuse(layer, before, kind, turned, projections, bottlenecks))
    return layers


def sites_of(layers: Sequence[LayerToFuse]) -> list[SiteTables]:
    """All layers' tables of linear sites."""
    return [tables for each in layers for _, tables in each.projections]


def sublayers_of(layers: Sequence[LayerToFuse]) -> list[BottleneckTable]:
    """All layers' tables of sublayers."""
    return [table for each in layers for table in each.bottlenecks]


class Angles:
    """The rotary embedding's cosines and sines by position, computed once by transformers' own module."""

    def __init__(self, rotary: Any, layer_type: str | None, context: int) -> None:
        """`layer_type`: whose, where a model's layers have several; `context`: positions that there are. More are
        never asked for: some rotations would change."""
        self._rotary = rotary if layer_type is None else partial(rotary, layer_type=layer_type)
        self._context = context
        self._known = 0

    @staticmethod
    def layer_type(rotary: Any, attention: Any) -> str | None:
        """Which of the model's rotations a layer takes; None where there is one."""
        return attention.layer_type if isinstance(rotary.rope_type, dict) else None

    @staticmethod
    def turned(rotary: Any) -> set[int]:
        """How many numbers of a head are rotated: of each kind of layer."""
        several = rotary.rope_type if isinstance(rotary.rope_type, dict) else {None: rotary.rope_type}
        return {2 * len(getattr(rotary, f"{kind}_inv_freq" if kind else "inv_freq")) for kind in several}

    def __call__(self, positions: np.ndarray, like: torch.Tensor) -> tuple[int, int]:
        """Addresses of [positions, turned] in the dtype of `like`, as far as these positions."""
        if (last := int(positions.max())) >= self._known:
            self._known = max(last + 1, min(self._context, max(_LEAST_ANGLES, 1 << last.bit_length())))
            self._cos, self._sin = self._rotary(like, torch.arange(self._known)[None])
        return self._cos.data_ptr(), self._sin.data_ptr()


Fits = Callable[[Sequence[nn.Module]], bool]
"""Whether a product takes linear modules that share an input, as one."""


def may_be_fused(model: Any, cache: KeyValuePages, fits: Fits, *, whole_heads: bool = False) -> bool:
    """Whether it is exact for this model; if not, the log says why. `whole_heads`: the device's fused layers rotate
    nothing but whole heads, by halves."""
    lacking = _lacking(model, cache, fits, whole_heads)
    if lacking is not None:
        log.info("%s keeps transformers' own layers: %s", type(model).__name__, lacking)
    return lacking is None


def _lacking(model: Any, cache: KeyValuePages, fits: Fits, whole_heads: bool) -> str | None:
    if type(model).__name__ not in families.MODELS:
        return f"fused ones are known for {', '.join(families.MODELS)}"
    turned = Angles.turned(model.model.rotary_emb)
    if len(turned) != 1 or (whole_heads and (turned != {cache.dim} or kind_of(model).neighbours)):
        return "the fused ones of this device rotate whole heads, all layers alike"
    config = model.config
    wanted = "gelu_pytorch_tanh" if kind_of(model).gelu else "silu"
    if (found := getattr(config, "hidden_activation", None) or config.hidden_act) != wanted:
        return f"the fused ones have {wanted}, not {found}"
    if any(getattr(config, name, None) for name in ("attn_logit_softcapping", "final_logit_softcapping")):
        return "the fused ones have no soft cap"
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
