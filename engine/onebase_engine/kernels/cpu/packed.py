"""Weights packed for `matmul4bit`, and several weights that share an input as one.

bitsandbytes' packed layout (see `tile4bit`) is in groups of 32 output rows, so weights side by side are just
concatenated: exact. bitsandbytes itself multiplies packed weights with AVX-512 BF16 only; elsewhere this product is
registered with it.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from onebase_engine.kernels.bitsandbytes_import import Linear4bit, QuantState, has_avx512bf16
from onebase_engine.kernels.cpu.matmul4bit import multiply
from onebase_engine.kernels.cpu.quantize4bit import pack
from onebase_engine.kernels.cpu.target import PLAIN, TARGET
from onebase_engine.kernels.cpu.tile4bit import FEATURES, UNROLL
from onebase_engine.kernels.lean_imports import without_compiler

_NO_TILES = np.empty((0, 1), np.int32)
_NOTHING = np.empty(0, np.int64)


def packable(module: nn.Module) -> bool:
    """Whether this machine and this weight can use the packed product."""
    return (
        isinstance(module, Linear4bit)
        and fits_packed(module.in_features, module.out_features, module.weight.quant_state.blocksize)
        and module.weight.device.type == "cpu"
    )


def fits_packed(in_features: int, out_features: int, blocksize: int = 64) -> bool:
    """Whether a weight of this size, once in 4 bit, could use the packed product on this machine."""
    fits = out_features % FEATURES == 0 and in_features % blocksize == 0 and blocksize % (2 * UNROLL) == 0
    return fits and TARGET != PLAIN


def _table(code: torch.Tensor) -> torch.Tensor:
    """The values of the 16 codes as a tile reads them."""
    return code.bfloat16().repeat(2)


def _packed(weight: torch.Tensor, state: QuantState) -> torch.Tensor:
    """A 4-bit weight in bitsandbytes' packed layout, and `state` changed to say so: to the bit what bitsandbytes
    does itself, which takes seconds for a small model."""
    if weight.dtype != torch.uint8:
        state.original_storage_type = weight.dtype
        weight = weight.view(torch.uint8)
    state.original_dtype, state.original_nested, state.original_qshape = state.dtype, state.nested, weight.shape
    rows, columns = state.shape
    packed = torch.empty(rows, columns // 2, dtype=torch.uint8)
    pack(weight.reshape(-1).numpy(), packed.view(-1).numpy(), columns // 2)
    absmax = state.absmax
    if state.nested:
        # As bitsandbytes does it, but without a thread for each block.
        inner = state.state2
        absmax = inner.code[absmax.int()] * inner.absmax.repeat_interleave(inner.blocksize)[: len(absmax)]
        absmax = absmax + state.offset
        state.nested = False
        del state.state2
    state.absmax = absmax.reshape(rows, columns // state.blocksize).T.to(torch.bfloat16).contiguous()
    state.dtype = torch.bfloat16
    state.packing_format_for_cpu = True
    return packed


class PackedLinear:
    """One or more Linear4bit modules with the same input as a single packed weight. The modules keep views of
    its rows, so that the memory is there once."""

    def __init__(self, modules: Sequence[Any]) -> None:
        for module in modules:
            state = module.weight.quant_state
            if not getattr(state, "packing_format_for_cpu", False):
                module.weight.data = _packed(module.weight.data, state)
        states = [module.weight.quant_state for module in modules]
        self.weight = torch.cat([module.weight.data for module in modules])
        self._absmax = torch.cat([state.absmax for state in states], dim=1).contiguous()
        self._codes = _table(states[0].code)
        self.in_features = modules[0].in_features
        self.out_features = sum(module.out_features for module in modules)
        self._blocksize = states[0].blocksize
        self._bias = self._join_biases(modules)
        row = 0
        for module in modules:
            module.weight.data = self.weight[row : row + module.out_features]
            row += module.out_features

    @staticmethod
    def _join_biases(modules: Sequence[Any]) -> torch.Tensor | None:
        if all(module.bias is None for module in modules):
            return None
        found = (torch.zeros(each.out_features) if each.bias is None else each.bias.detach() for each in modules)
        return torch.cat([bias.bfloat16() for bias in found])

    @property
    def description(self) -> dict[str, int]:
        """As `multiply` has it: addresses of the codes' values, weight, scales and bias (0 for none), and sizes."""
        return {
            "codes": self._codes.data_ptr(),
            "out_features": self.out_features,
            "in_features": self.in_features,
            "weight": self.weight.data_ptr(),
            "absmax": self._absmax.data_ptr(),
            "block": self._blocksize,
            "bias": 0 if self._bias is None else self._bias.data_ptr(),
        }

    def __call__(self, x: int, out: int, rows: int) -> None:
        """out = x W^T + bias; addresses of contiguous bfloat16 [rows, in_features] and [rows, out_features]."""
        multiply(
            x, out, rows, self._codes.data_ptr(), self.out_features, self.in_features, self.weight.data_ptr(),
            self._absmax.data_ptr(), self._blocksize, 0 if self._bias is None else self._bias.data_ptr(), _NO_TILES,
            _NOTHING, _NOTHING,
        )  # fmt: skip


def multiply_packed(
    x: torch.Tensor,
    packed: torch.Tensor,
    shape: Sequence[int],
    absmax: torch.Tensor,
    code: torch.Tensor,
    block: int,
) -> torch.Tensor:
    """x W^T, of x [..., in] and a packed weight of `shape` [out, in]; absmax [in / block, out] bfloat16."""
    rows = x.to(torch.bfloat16).reshape(-1, x.shape[-1]).contiguous()
    n, k = shape
    y = torch.empty(len(rows), n, dtype=torch.bfloat16)
    codes = _table(code)
    multiply(
        rows.data_ptr(), y.data_ptr(), len(rows), codes.data_ptr(), n, k, packed.data_ptr(), absmax.data_ptr(),
        block, 0, _NO_TILES, _NOTHING, _NOTHING,
    )  # fmt: skip
    return y.view(*x.shape[:-1], n).to(x.dtype)


if not has_avx512bf16():
    with without_compiler():
        torch.library.register_kernel("bitsandbytes::gemv_4bit", "cpu", multiply_packed)
