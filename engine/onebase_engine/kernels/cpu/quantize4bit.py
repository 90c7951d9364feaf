"""4-bit quantisation, to the bits of bitsandbytes', and packing as `tile4bit` reads it."""

import numpy as np
from numba import carray, njit, types

from onebase_engine.kernels.cpu.task import FLAG, WHOLE, Arguments, array
from onebase_engine.kernels.cpu.tile4bit import FEATURES
from onebase_engine.kernels.cpu.vector import f32_from_bf16, f32_pointer, larger, u16_pointer

_BLOCKS = 256
"""Blocks in one task; each has one scale."""

QUANTIZE = Arguments(
    WHOLE, WHOLE, FLAG, WHOLE, array(types.float32), array(types.uint8), array(types.uint8), array(types.float32)
)
"""As `quantize` has them."""
PACK = Arguments(array(types.uint8), array(types.uint8), WHOLE)
"""As `pack` has them."""
_read, _read_pack = QUANTIZE.read, PACK.read


@njit(nogil=True, error_model="numpy", fastmath=True)  # type: ignore[untyped-decorator]
def _largest(values: np.ndarray) -> np.float32:
    """The largest absolute value; the same in any order."""
    highest = np.float32(0.0)
    for i in range(values.shape[0]):
        highest = larger(highest, abs(values[i]))
    return highest


@QUANTIZE.work
def _quantize_blocks(task: int, at: int) -> None:
    values, n, narrow, block, bounds, order, packed, largest = _read(at)
    below, floats = np.empty(block, np.int32), np.empty(block, np.float32)
    for b in range(task * _BLOCKS, min(largest.shape[0], (task + 1) * _BLOCKS)):
        part = floats[: min(block, n - b * block)]
        if narrow:
            bits = carray(u16_pointer(values + 2 * b * block), part.shape[0], np.uint16)
            for i in range(part.shape[0]):
                part[i] = f32_from_bf16(bits[i])
        else:
            given = carray(f32_pointer(values + 4 * b * block), part.shape[0], np.float32)
            for i in range(part.shape[0]):
                part[i] = given[i]
        highest = _largest(part)
        floor = max(highest, np.float32(1e-38))
        largest[b] = highest if part.shape[0] == block else floor
        inverse = np.float32(1.0) / floor
        for i in range(part.shape[0]):
            # bitsandbytes multiplies in whole blocks and divides in the last, shorter one.
            value = part[i] * inverse if part.shape[0] == block else part[i] / floor
            part[i] = min(max(value, np.float32(-1.0)), np.float32(1.0))
        floats[part.shape[0] :] = np.float32(0.0)
        for i in range(block):
            below[i] = 0
        for bound in bounds:
            for i in range(block):
                below[i] += floats[i] > bound
        target = packed[b * block // 2 : min(packed.shape[0], (b + 1) * block // 2)]
        for i in range(target.shape[0]):
            target[i] = (order[below[2 * i]] << 4) | order[below[2 * i + 1]]


_quantize = QUANTIZE.kernel(_quantize_blocks)


def quantize(
    values: int, n: int, narrow: bool, block: int, bounds: np.ndarray, order: np.ndarray, packed: np.ndarray,
    largest: np.ndarray,
) -> None:  # fmt: skip
    """n numbers in blocks, bfloat16 (`narrow`) or float32 at an address -> packed [(n + 1) // 2] uint8 (first of
    two in the high half), largest absolute values [blocks] float32. A number's code is `order` of how many of the
    ascending `bounds` are below it."""
    _quantize(-(-len(largest) // _BLOCKS), values, n, narrow, block, bounds, order, packed, largest)


@PACK.work
def _pack_group(group: int, at: int) -> None:
    rows, packed, half = _read_pack(at)
    target = packed[group * FEATURES * half : (group + 1) * FEATURES * half]
    for feature in range(FEATURES // 2):
        first = (group * FEATURES + feature) * half
        low, high = (
            rows[first : first + half],
            rows[first + FEATURES // 2 * half : first + (FEATURES // 2 + 1) * half],
        )
        for pair in range(half):
            place = pair * FEATURES + 2 * feature
            target[place] = (low[pair] >> 4) | (high[pair] & 0xF0)
            target[place + 1] = (low[pair] & 0x0F) | (high[pair] << 4)


_pack = PACK.kernel(_pack_group)


def pack(rows: np.ndarray, packed: np.ndarray, half: int) -> None:
    """Rows of `half` bytes each, as `quantize` packs them, to the layout that `tile4bit` has; both uint8, flat."""
    _pack(len(rows) // (FEATURES * half), rows, packed, half)
