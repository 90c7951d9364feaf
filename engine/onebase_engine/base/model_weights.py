"""The base's weights as they are served, dequantised one site at a time: what some methods' lowering needs."""

import copy
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from onebase_engine.kernels.bitsandbytes_import import Linear4bit, dequantize_4bit, unpack_for_cpu
from onebase_engine.kernels.coded_linear import CodedLinear


class ModelWeights:
    """`BaseWeights` of a loaded model. Only reads, so any thread may call it."""

    def __init__(self, model: nn.Module) -> None:
        self._modules: dict[str, Any] = dict(model.named_modules())
        """As they were before any was wrapped."""

    def weight(self, site: str) -> torch.Tensor:
        """[out_features, in_features] of a linear site, [vocab, hidden] of the embedding; float32 on the CPU."""
        module = self._modules[site]
        if isinstance(module, CodedLinear):
            return module.coded.expanded().cpu()
        if isinstance(module, Linear4bit):
            return _dequantised(module.weight).float().cpu()
        weight: torch.Tensor = module.weight.detach().float().cpu()
        return weight.t().contiguous() if isinstance(module, Conv1D) else weight.clone()

    def bias(self, site: str) -> torch.Tensor | None:
        """[out_features], float32 on the CPU, if the site has one."""
        bias = getattr(self._modules[site], "bias", None)
        return None if bias is None else bias.detach().float().cpu()


def _dequantised(weight: Any) -> torch.Tensor:
    data, state = weight.data, copy.copy(weight.quant_state)
    if getattr(state, "packing_format_for_cpu", False):
        scales = state.absmax.t().reshape(-1).float()
        state.original_nested = False  # else the blocks' scales would be quantised a second time
        data, state = unpack_for_cpu(data, state)
        state.absmax = scales
    dense: torch.Tensor = dequantize_4bit(data, state)
    return dense
