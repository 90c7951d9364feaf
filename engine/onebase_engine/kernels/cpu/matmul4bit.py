"""The product with packed 4-bit weights on CPUs.

Work is dealt by groups of 32 output rows (see `tile4bit`), so that a weight is unpacked for several rows of x at a
time.
"""

import numpy as np
from numba import carray, njit, types

from onebase_engine.kernels.cpu.task import WHOLE, Arguments, array
from onebase_engine.kernels.cpu.tile4bit import FEATURES, packed_tile
from onebase_engine.kernels.cpu.vector import bf16_from_f32, f32_from_bf16, u16_pointer

PANEL = 256
"""Rows of x that pass by all weights before the next: they stay in the second-level cache meanwhile."""

_one, _two, _three, _four, _eight = (packed_tile(rows) for rows in (1, 2, 3, 4, 8))

MULTIPLY = Arguments(*[WHOLE] * 10, array(types.int32, 2), array(types.int64), array(types.int64))
"""As `multiply` has them."""
_read = MULTIPLY.read


@njit(nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def multiply_tasks(rows: int, n: int) -> int:
    """How many tasks `multiply` has."""
    return n // FEATURES * ((rows + PANEL - 1) // PANEL)


@MULTIPLY.work
def multiply_task(task: int, at: int) -> None:
    """One task of `multiply`: a group of features for a panel of rows."""
    x, y, rows, codes, n, k, weight, absmax, block, bias, tiles, starts, sizes = _read(at)
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


_multiply = MULTIPLY.kernel(multiply_task)


def multiply(
    x: int, y: int, rows: int, codes: int, n: int, k: int, weight: int, absmax: int, block: int, bias: int,
    tiles: np.ndarray, starts: np.ndarray, sizes: np.ndarray,
) -> None:  # fmt: skip
    """y = x W^T + bias: addresses of contiguous bfloat16 x [rows, k] and y [rows, n]; the rest to `bias` are
    `PackedLinear.description`.

    Meanwhile the adapters' weights for these sites, which are needed next and for which memory would be too slow,
    are fetched: of each tile's slot `tiles[:, 0]` the `sizes` bytes at `starts`, cut in pieces, in the order in
    which threads will read them.
    """
    tasks = n // FEATURES * ((rows + PANEL - 1) // PANEL)
    _multiply(tasks, x, y, rows, codes, n, k, weight, absmax, block, bias, tiles, starts, sizes)
