"""The product with 4-bit weights on CPUs, and several weights that share an input as one.

bitsandbytes' packed layout (see `tile4bit`) is in groups of 32 output rows, so weights side by side are just
concatenated: exact. Work is dealt by groups, so that a weight is unpacked for several rows of x at a time.
bitsandbytes itself multiplies packed weights with AVX-512 BF16 only; elsewhere this product is registered with it.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from bitsandbytes.functional import _convert_weight_packed_for_cpu, has_avx512bf16
from bitsandbytes.nn import Linear4bit
from numba import carray, njit, prange
from torch import nn

from onebase_adapters.kernels.cpu.target import PLAIN, TARGET
from onebase_adapters.kernels.cpu.tile4bit import FEATURES, UNROLL, packed_tile
from onebase_adapters.kernels.cpu.vector import bf16_from_f32, f32_from_bf16, u16_pointer

PANEL = 256
"""Rows of x that pass by all weights before the next: they stay in the second-level cache meanwhile."""

_NO_TILES = np.empty((0, 1), np.int32)
_NOTHING = np.empty(0, np.int64)
_one, _two, _three, _four, _eight = (packed_tile(rows) for rows in (1, 2, 3, 4, 8))


@njit(cache=True, nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def multiply_tasks(rows: int, n: int) -> int:
    """How many tasks `multiply` has."""
    return n // FEATURES * ((rows + PANEL - 1) // PANEL)


@njit(cache=True, nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def multiply_task(
    task: int,
    x: int,
    y: int,
    rows: int,
    codes: int,
    n: int,
    k: int,
    weight: int,
    absmax: int,
    block: int,
    bias: int,
    tiles: np.ndarray,
    starts: np.ndarray,
    sizes: np.ndarray,
) -> None:
    """One task's part of `multiply`: a group of features for a panel of rows."""
    groups = n // FEATURES
    panels = (rows + PANEL - 1) // PANEL
    turns = (min(rows, PANEL) + 7) // 8
    pieces = groups * turns // max(1, tiles.shape[0]) if panels == 1 else 0
    blocks, pairs = k // block, block // 2
    panel, group = task // groups, task % groups
    w = weight + group * k * FEATURES // 2
    s = absmax + 2 * group * FEATURES
    row = panel * PANEL
    last = min(rows, row + PANEL)
    while row < last:
        left = last - row
        wanted, size = weight, 0
        if pieces > 0:
            turn = group * turns + row // 8
            if turn < pieces * tiles.shape[0]:
                slot = tiles[turn // pieces, 0]
                size = sizes[slot] // pieces
                wanted = starts[slot] + turn % pieces * size
        a, c = x + 2 * row * k, y + 2 * (row * n + group * FEATURES)
        if left >= 8:
            _eight(c, n, a, k, w, s, n, blocks, pairs, codes, wanted, size)
            row += 8
        elif left >= 4:
            _four(c, n, a, k, w, s, n, blocks, pairs, codes, wanted, size)
            row += 4
        elif left == 3:
            _three(c, n, a, k, w, s, n, blocks, pairs, codes, wanted, size)
            row += 3
        elif left == 2:
            _two(c, n, a, k, w, s, n, blocks, pairs, codes, wanted, size)
            row += 2
        else:
            _one(c, n, a, k, w, s, n, blocks, pairs, codes, wanted, size)
            row += 1
    if bias != 0:
        terms = carray(u16_pointer(bias + 2 * group * FEATURES), FEATURES, np.uint16)
        for row in range(panel * PANEL, last):
            part = carray(u16_pointer(y + 2 * (row * n + group * FEATURES)), FEATURES, np.uint16)
            for i in range(FEATURES):
                part[i] = bf16_from_f32(f32_from_bf16(part[i]) + f32_from_bf16(terms[i]))


@njit(cache=True, nogil=True, error_model="numpy", parallel=True)  # type: ignore[untyped-decorator]
def multiply(
    x: int,
    y: int,
    rows: int,
    codes: int,
    n: int,
    k: int,
    weight: int,
    absmax: int,
    block: int,
    bias: int,
    tiles: np.ndarray,
    starts: np.ndarray,
    sizes: np.ndarray,
) -> None:
    """y = x W^T + bias: addresses of contiguous bfloat16 x [rows, k] and y [rows, n]; the rest to `bias` are
    `PackedLinear.numbers`.

    Meanwhile the adapters' weights for these sites, which are needed next and for which memory would be too slow,
    are fetched: of each tile's slot `tiles[:, 0]` the `sizes` bytes at `starts`, cut in pieces, in the order in
    which threads will read them.
    """
    for task in prange(multiply_tasks(rows, n)):
        multiply_task(task, x, y, rows, codes, n, k, weight, absmax, block, bias, tiles, starts, sizes)


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
    def numbers(self) -> list[int]:
        """Address of the codes' values; out_features, in_features; addresses of weight and scales; block size;
        address of the bias, 0 for none."""
        bias = 0 if self._bias is None else self._bias.data_ptr()
        weight = [self.weight.data_ptr(), self._absmax.data_ptr(), self._blocksize]
        return [self._codes.data_ptr(), self.out_features, self.in_features, *weight, bias]

    def __call__(self, x: int, out: int, rows: int) -> None:
        """out = x W^T + bias; addresses of contiguous bfloat16 [rows, in_features] and [rows, out_features]."""
        multiply(x, out, rows, *self.numbers, _NO_TILES, _NOTHING, _NOTHING)


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
    y = torch.empty(len(rows), shape[0], dtype=torch.bfloat16)
    codes = _table(code)
    multiply(
        rows.data_ptr(), y.data_ptr(), len(rows), codes.data_ptr(), *shape, packed.data_ptr(), absmax.data_ptr(),
        block, 0, _NO_TILES, _NOTHING, _NOTHING,
    )  # fmt: skip
    return y.view(*x.shape[:-1], shape[0]).to(x.dtype)


if not has_avx512bf16():
    torch.library.register_kernel("bitsandbytes::gemv_4bit", "cpu", multiply_packed)
