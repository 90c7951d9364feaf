"""bitsandbytes' 4-bit product on CPUs, called by address, and several weights that share an input as one.

Its packed layout is in groups of 32 output rows, so weights side by side are just concatenated: exact.
"""

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from bitsandbytes.cextension import lib
from bitsandbytes.functional import _convert_weight_packed_for_cpu, has_avx512bf16
from bitsandbytes.nn import Linear4bit
from torch import nn

_ROWS = 32
"""Output rows in a group of the packed layout."""


def packable(module: nn.Module) -> bool:
    """Whether this machine and this weight can use the packed product."""
    return (
        isinstance(module, Linear4bit)
        and fits_packed(module.in_features, module.out_features, module.weight.quant_state.blocksize)
        and module.weight.device.type == "cpu"
    )


def fits_packed(in_features: int, out_features: int, blocksize: int = 64) -> bool:
    """Whether a weight of this size, once in 4 bit, could use the packed product on this machine."""
    return has_avx512bf16() and out_features % _ROWS == 0 and in_features % blocksize == 0


class PackedLinear:
    """One or more Linear4bit modules with the same input as a single packed weight. The modules keep views of
    its rows, so that the memory is there once."""

    def __init__(self, modules: Sequence[Any]) -> None:
        for module in modules:
            state = module.weight.quant_state
            if not getattr(state, "packing_format_for_cpu", False):
                module.weight.data, module.weight.quant_state = _convert_weight_packed_for_cpu(
                    module.weight.data, state
                )
        states = [module.weight.quant_state for module in modules]
        self.weight = torch.cat([module.weight.data for module in modules])
        self._absmax = torch.cat([state.absmax for state in states], dim=1).contiguous()
        self.in_features = modules[0].in_features
        self.out_features = sum(module.out_features for module in modules)
        self._address = _address(states[0].quant_type)
        self._function = _prototype(self._address)
        self._blocksize = states[0].blocksize
        row = 0
        for module in modules:
            module.weight.data = self.weight[row : row + module.out_features]
            row += module.out_features

    @property
    def numbers(self) -> list[int]:
        """Address of the product; out_features, in_features; addresses of weight and scales; block size."""
        sizes = [self.out_features, self.in_features]
        return [self._address, *sizes, self.weight.data_ptr(), self._absmax.data_ptr(), self._blocksize]

    def __call__(self, x: int, out: int, rows: int) -> None:
        """out = x W^T; addresses of contiguous bfloat16 [rows, in_features] and [rows, out_features]."""
        n, k = self.out_features, self.in_features
        weight, absmax = self.weight.data_ptr(), self._absmax.data_ptr()
        self._function(rows, n, k, x, weight, absmax, out, self._blocksize, k, n)


def _address(quant_type: str) -> int:
    function = getattr(lib, f"gemv_4bit_inference_cpu_{quant_type}_bf16")
    return ctypes.cast(function, ctypes.c_void_p).value or 0


def _prototype(address: int) -> Any:
    # One of our own: bitsandbytes' shared handle must keep its (absent) argument types.
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    return ctypes.CFUNCTYPE(None, *[integer] * 3, *[pointer] * 4, *[integer] * 3)(address)
