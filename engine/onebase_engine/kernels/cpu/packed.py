"""Weights packed for `matmul4bit`, and several weights that share an input as one.

bitsandbytes' packed layout (see `tile4bit`) is in groups of 32 output rows, so weights side by side are just
concatenated: exact. bitsandbytes itself multiplies packed weights with AVX-512 BF16 only; elsewhere this product is
registered with it.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from math import gcd
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from onebase_engine.kernels.bitsandbytes_import import Linear4bit, QuantState, has_avx512bf16
from onebase_engine.kernels.coded_linear import CodedLinear, CodedWeight
from onebase_engine.kernels.cpu.block_sums import sum_blocks
from onebase_engine.kernels.cpu.matmul4bit import multiply
from onebase_engine.kernels.cpu.quantize4bit import pack
from onebase_engine.kernels.cpu.target import PLAIN, TARGET
from onebase_engine.kernels.cpu.tile4bit import FEATURES, UNROLL, Form
from onebase_engine.kernels.lean_imports import without_compiler

_NO_TILES = np.empty((0, 1), np.int32)
_NOTHING = np.empty(0, np.int64)


def packable(module: nn.Module) -> bool:
    """Whether this machine and this weight can use the packed product, on inputs in their order."""
    if isinstance(module, CodedLinear) and module.coded.order is not None:
        return False
    return _has_product(module)


def pack_at_first_use(module: nn.Module) -> None:
    """Let a weight be packed at its first use where it can be: bitsandbytes would try with any size on a CPU that
    it has a product for, and on no other."""
    if isinstance(module, Linear4bit):
        module.support_avx512bf16_for_cpu = _has_product(module)
    elif isinstance(module, CodedLinear) and _has_product(module):
        module.pack = _pack_alone


def _pack_alone(module: CodedLinear) -> None:
    PackedLinear([module])


def _has_product(module: nn.Module) -> bool:
    if isinstance(module, CodedLinear):
        block = module.coded.block
    elif isinstance(module, Linear4bit):
        block = module.weight.quant_state.blocksize
    else:
        return False
    return module.weight.device.type == "cpu" and fits_packed(module.in_features, module.out_features, block)


def fits_packed(in_features: int, out_features: int, blocksize: int = 64) -> bool:
    """Whether a weight of this size, once in 4 bit, could use the packed product on this machine."""
    fits = out_features % FEATURES == 0 and in_features % blocksize == 0 and blocksize % (2 * UNROLL) == 0
    return fits and TARGET != PLAIN


def _table(code: torch.Tensor) -> torch.Tensor:
    """The values of the 16 codes as a tile reads them."""
    return code.bfloat16().repeat(2)


_NAMES: Mapping[torch.dtype, Literal["bfloat16", "float16", "float32"]] = {
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    torch.float32: "float32",
}


_CODES: Mapping[torch.dtype, Literal["nibbles", "int8", "float8"]] = {
    torch.uint8: "nibbles",
    torch.int8: "int8",
    torch.float8_e4m3fn: "float8",
}


def _in_tiles(codes: torch.Tensor, rows: int, half: int) -> torch.Tensor:
    packed = torch.empty(rows, half, dtype=torch.uint8)
    pack(codes.reshape(-1).numpy(), packed.view(-1).numpy(), half)
    return packed


def _coded(module: Any) -> CodedWeight:
    """The module's weight, in tiles."""
    if isinstance(module, CodedLinear):
        return _tiled(module.coded)
    state = module.weight.quant_state
    if not getattr(state, "packing_format_for_cpu", False):
        module.weight.data = _packed(module.weight.data, state)
    return CodedWeight(module.weight.data, state.code, state.absmax, in_tiles=True)


def _tiled(weight: CodedWeight) -> CodedWeight:
    if weight.in_tiles:
        return weight
    codes, (out, width) = weight.codes, weight.codes.shape
    if weight.wide:
        tiles = codes.view(torch.int8).view(-1, 2, FEATURES // 2, width // 2, 2).permute(0, 3, 1, 2, 4)
        tiles = tiles.reshape(out, width).view(codes.dtype)
    else:
        tiles = _in_tiles(codes, out, width)
    return replace(weight, codes=tiles, in_tiles=True)


def _form(weight: CodedWeight) -> Form:
    scales, codes = _NAMES[weight.scales.dtype], _CODES[weight.codes.dtype]
    if weight.offsets is None:
        return Form(scales, codes=codes)
    return Form(scales, "steps" if weight.offsets.dtype == torch.int8 else "added", codes)


def can_be_one(modules: Sequence[nn.Module]) -> bool:
    """Whether these modules, all packable, can be one product: alike, or all of codes that can be widened."""
    coded = (module.coded for module in modules if isinstance(module, CodedLinear))
    blocks = [weight.block for weight in coded if _CODES[weight.codes.dtype] != "float8"]
    wide = len(blocks) == len(modules) and fits_packed(gcd(*blocks), FEATURES, gcd(*blocks))
    return wide or len({_kind(module) for module in modules}) == 1


def _alike(modules: Sequence[Any]) -> list[CodedWeight]:
    """The modules' weights, in tiles and of one kind."""
    if len({_kind(module) for module in modules}) == 1:
        return [_coded(module) for module in modules]
    block = gcd(*(module.coded.block for module in modules))
    return [_tiled(module.coded.widened(block)) for module in modules]


def _kind(module: Any) -> tuple[object, ...]:
    if isinstance(module, CodedLinear):
        weight = module.coded
        return (_form(weight), weight.block, *weight.values.tolist())
    state = module.weight.quant_state
    return (state.quant_type, state.blocksize)


def _packed(weight: torch.Tensor, state: QuantState) -> torch.Tensor:
    """A 4-bit weight in bitsandbytes' packed layout, and `state` changed to say so: to the bit what bitsandbytes
    does itself, which takes seconds for a small model."""
    if weight.dtype != torch.uint8:
        state.original_storage_type = weight.dtype
        weight = weight.view(torch.uint8)
    state.original_dtype, state.original_nested, state.original_qshape = state.dtype, state.nested, weight.shape
    rows, columns = state.shape
    packed = _in_tiles(weight, rows, columns // 2)
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
    """One or more modules with the same input as a single packed weight. The modules keep views of its rows, so
    that the memory is there once."""

    def __init__(self, modules: Sequence[Any]) -> None:
        weights = _alike(modules)
        first = weights[0]
        self.weight = torch.cat([weight.codes.view(torch.uint8) for weight in weights]).view(first.codes.dtype)
        self._scales = torch.cat([weight.scales for weight in weights], dim=1).contiguous()
        offsets = [weight.offsets for weight in weights if weight.offsets is not None]
        self._offsets = torch.cat(offsets, dim=1).contiguous() if offsets else None
        self._codes = _table(first.values)  # of int8, which are looked up nowhere, empty
        self._block = first.block
        self.form = _form(first)
        self.in_features = modules[0].in_features
        self.out_features = sum(module.out_features for module in modules)
        self._bias = self._join_biases(modules)
        row = 0
        for module, weight in zip(modules, weights, strict=True):
            part = self._rows(row, row + module.out_features)
            if isinstance(module, CodedLinear):
                held = replace(weight, codes=part.weight, scales=part._scales, offsets=part._offsets)
                module.put(held, part.product)
            else:
                module.weight.data = part.weight
            row += module.out_features

    def _rows(self, first: int, last: int) -> "PackedLinear":
        """Some of its output features, in the same memory."""
        part = copy.copy(self)
        part.weight, part._scales = self.weight[first:last], self._scales[:, first:last]
        part._offsets = None if self._offsets is None else self._offsets[:, first:last]
        part._bias = None if self._bias is None else self._bias[first:last]
        part.out_features = last - first
        return part

    @staticmethod
    def _join_biases(modules: Sequence[Any]) -> torch.Tensor | None:
        if all(module.bias is None for module in modules):
            return None
        found = (torch.zeros(each.out_features) if each.bias is None else each.bias.detach() for each in modules)
        return torch.cat([bias.bfloat16() for bias in found])

    @cached_property
    def description(self) -> dict[str, int]:
        """As `multiply` has it: addresses of the codes' values, weight, scales, offsets and bias (0 for none), and
        sizes."""
        return {
            "codes": self._codes.data_ptr(),
            "out_features": self.out_features,
            "in_features": self.in_features,
            "weight": self.weight.data_ptr(),
            "absmax": self._scales.data_ptr(),
            "offsets": 0 if self._offsets is None else self._offsets.data_ptr(),
            "scale_stride": self._scales.stride(0),
            "block": self._block,
            "bias": 0 if self._bias is None else self._bias.data_ptr(),
        }

    @property
    def sums(self) -> int:
        """Sums of blocks of inputs that the product takes for a row; 0 without offsets."""
        return 0 if self._offsets is None else self.in_features // self._block

    def __call__(self, x: int, out: int, rows: int) -> None:
        """out = x W^T + bias; addresses of contiguous bfloat16 [rows, in_features] and [rows, out_features]."""
        sums = 0
        if self.sums:
            held = torch.empty(rows * self.sums, dtype=torch.float32)
            sums = held.data_ptr()
            sum_blocks(x, self.in_features, self._block, sums, rows)
        multiply(x, out, rows, self.description, self.form, sums, _NO_TILES, _NOTHING, _NOTHING)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in_features] of any dtype W^T + bias, in that dtype."""
        rows = x.to(torch.bfloat16).reshape(-1, self.in_features).contiguous()
        made = torch.empty(len(rows), self.out_features, dtype=torch.bfloat16)
        self(rows.data_ptr(), made.data_ptr(), len(rows))
        return made.view(*x.shape[:-1], self.out_features).to(x.dtype)


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
    weight = {
        "codes": codes.data_ptr(), "out_features": n, "in_features": k, "weight": packed.data_ptr(),
        "absmax": absmax.data_ptr(), "offsets": 0, "scale_stride": n, "block": block, "bias": 0,
    }  # fmt: skip
    multiply(rows.data_ptr(), y.data_ptr(), len(rows), weight, Form(), 0, _NO_TILES, _NOTHING, _NOTHING)
    return y.view(*x.shape[:-1], n).to(x.dtype)


if not has_avx512bf16():
    with without_compiler():
        torch.library.register_kernel("bitsandbytes::gemv_4bit", "cpu", multiply_packed)
