"""Householder reflection adaptation (Yuan et al. 2024): a layer's input is reflected r times before its weights.

r reflections are together I - U S^-1 U^T with S the upper triangle of U^T U and 1/2 on its diagonal (the compact
form of Schreiber and Van Loan 1989). PEFT multiplies whole matrices instead, [in, in] for each reflection.
"""

from typing import Any

import peft
import torch
from peft.tuners.hra import HRALinear

from onebase_contract.settings import TrainConfig
from onebase_engine.base.load_base import LoadedBase
from onebase_training.methods.deltas import delta
from onebase_training.model.attached import Attached

LEARNING_RATE = 1e-3
"""Measured, see docs/decisions/0044."""
RANK = 8
_attach = delta(peft.HRAConfig, RANK)


def attach(base: LoadedBase, config: TrainConfig, steps: int) -> Attached:
    """`rank` reflections of each linear layer's input, float32."""
    attached = _attach(base, config, steps)
    for module in attached.model.modules():
        if type(module) is HRALinear:
            module.forward = _Forward(module)
    return attached


class _Forward:
    """Takes the place of a layer's `forward`."""

    def __init__(self, layer: HRALinear) -> None:
        self._layer: Any = layer
        self._usual = layer.forward

    def __call__(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        layer = self._layer
        if layer.disable_adapters or layer.merged:
            usual: torch.Tensor = self._usual(x, *args, **kwargs)
            return usual
        out: torch.Tensor = layer.base_layer(_reflected(x, layer.hra_u["default"]), *args, **kwargs)
        return out


def _reflected(x: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    """x [..., in] through the reflections by the columns of `vectors` [in, r], the last one first."""
    with torch.autocast(x.device.type, enabled=False):
        unit = vectors / vectors.norm(dim=0)
        one = torch.eye(unit.shape[1], device=unit.device)
        inverse = torch.linalg.solve_triangular((unit.T @ unit).triu(1) + 0.5 * one, one, upper=True)
        ahead, back = unit @ inverse.T, unit.T
    along: torch.Tensor = (x @ ahead.to(x.dtype)) @ back.to(x.dtype)
    return x - along
