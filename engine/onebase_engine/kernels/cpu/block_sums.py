"""Sums of blocks of inputs, which the product with 4-bit weights takes for their offsets.

A row is summed by whoever makes it, where that is possible: a stage of its own costs more than the sums do.
"""

import numpy as np
from numba import carray, njit

from onebase_engine.kernels.cpu.task import WHOLE, Arguments
from onebase_engine.kernels.cpu.vector import f32_from_bf16, f32_pointer, u16_pointer

SERIAL_ROWS = 4
SUM = Arguments(*[WHOLE] * 4)
"""As `sum_blocks` has them, but for its rows."""
_read = SUM.read


@njit(nogil=True, error_model="numpy", fastmath={"reassoc", "nsz"})  # type: ignore[untyped-decorator]
def _sum(values: np.ndarray) -> np.float32:
    """The sum of bfloat16 bits; in one order for one length."""
    summed = np.float32(0.0)
    for i in range(values.shape[0]):
        summed += f32_from_bf16(values[i])
    return summed


@njit(nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def sum_row_blocks(row: int, x: int, k: int, block: int, sums: int) -> None:
    """One row of `sum_blocks`; nothing if `block` is 0."""
    if block == 0:
        return
    blocks = k // block
    values = carray(u16_pointer(x + 2 * row * k), k, np.uint16)
    found = carray(f32_pointer(sums + 4 * row * blocks), blocks, np.float32)
    for b in range(blocks):
        found[b] = _sum(values[b * block : (b + 1) * block])


@SUM.work
def sum_row(row: int, at: int) -> None:
    """One task of `sum_blocks`."""
    x, k, block, sums = _read(at)
    sum_row_blocks(row, x, k, block, sums)


_sum_blocks = SUM.kernel(sum_row, serial=SERIAL_ROWS)


def sum_blocks(x: int, k: int, block: int, sums: int, rows: int) -> None:
    """`sums` [rows, k / block] float32 = the sum of each block of x [rows, k] bfloat16; contiguous addresses."""
    _sum_blocks(rows, x, k, block, sums)
