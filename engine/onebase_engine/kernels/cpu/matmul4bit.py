"""The product with packed weights of 4 or 8 bits on CPUs.

Work is dealt by groups of 32 output rows (see `tile4bit`), so that a weight is unpacked for several rows of x at a
time.
"""

from collections.abc import Mapping

import numpy as np
from numba import carray, njit, types

from onebase_engine.kernels.cpu.task import WHOLE, Arguments, Compiled, array
from onebase_engine.kernels.cpu.tile4bit import FEATURES, Form, packed_tile
from onebase_engine.kernels.cpu.vector import bf16_from_f32, f32_from_bf16, u16_pointer

PANEL = 256
"""Rows of x that pass by all weights before the next: they stay in the second-level cache meanwhile."""

MULTIPLY = Arguments(*[WHOLE] * 13, array(types.int32, 2), array(types.int64), array(types.int64))
"""As `multiply` has them."""
_read = MULTIPLY.read


@njit(nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def multiply_tasks(rows: int, n: int) -> int:
    """How many tasks `multiply` has."""
    return n // FEATURES * ((rows + PANEL - 1) // PANEL)


def _multiply_task(form: Form) -> Compiled:
    """One task of `multiply` for weights of this form: a group of features for a panel of rows."""
    one, two, three, four, eight = (packed_tile(rows, form=form) for rows in (1, 2, 3, 4, 8))
    size_of_scale, size_of_offset, size_of_pair = form.size, form.size_of_offset, form.size_of_pair

    def multiply_task(task: int, at: int) -> None:
        x, y, rows, codes, n, k, weight, absmax, offsets, stride, sums, block, bias, tiles, starts, sizes = _read(
            at
        )
        groups = n // FEATURES
        panels = (rows + PANEL - 1) // PANEL
        turns = (min(rows, PANEL) + 7) // 8
        pieces = groups * turns // max(1, tiles.shape[0]) if panels == 1 else 0
        blocks, pairs = k // block, block // 2
        panel, group = task // groups, task % groups
        w = weight + group * (k // 2) * size_of_pair
        s = absmax + size_of_scale * group * FEATURES
        o = offsets + size_of_offset * group * FEATURES
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
            d = sums + 4 * row * blocks
            if left >= 8:
                eight(c, n, a, k, w, s, o, stride, d, blocks, pairs, codes, wanted, size)
                row += 8
            elif left >= 4:
                four(c, n, a, k, w, s, o, stride, d, blocks, pairs, codes, wanted, size)
                row += 4
            elif left == 3:
                three(c, n, a, k, w, s, o, stride, d, blocks, pairs, codes, wanted, size)
                row += 3
            elif left == 2:
                two(c, n, a, k, w, s, o, stride, d, blocks, pairs, codes, wanted, size)
                row += 2
            else:
                one(c, n, a, k, w, s, o, stride, d, blocks, pairs, codes, wanted, size)
                row += 1
        if bias != 0:
            terms = carray(u16_pointer(bias + 2 * group * FEATURES), FEATURES, np.uint16)
            for row in range(panel * PANEL, last):
                part = carray(u16_pointer(y + 2 * (row * n + group * FEATURES)), FEATURES, np.uint16)
                for i in range(FEATURES):
                    part[i] = bf16_from_f32(f32_from_bf16(part[i]) + f32_from_bf16(terms[i]))

    if form != Form():
        multiply_task.__name__ += "_" + "_".join(form)
    return MULTIPLY.work(multiply_task)


TASKS = {
    form: _multiply_task(form)
    for form in (
        Form(),
        Form("float16"),
        Form("float16", "steps"),
        Form("float16", "added"),
        Form("float32"),
        Form("float32", "steps"),
        Form("float32", "added"),
        Form("float16", codes="int8"),
        Form("float16", "added", codes="int8"),
        Form("float32", codes="int8"),
        Form("float32", "added", codes="int8"),
        Form("float32", codes="float8"),
    )
}
"""The work for each form of a weight."""
_kernels = {form: MULTIPLY.kernel(task) for form, task in TASKS.items()}


def multiply(
    x: int, y: int, rows: int, weight: Mapping[str, int], form: Form, sums: int, tiles: np.ndarray,
    starts: np.ndarray, sizes: np.ndarray,
) -> None:  # fmt: skip
    """y = x W^T + bias: addresses of contiguous bfloat16 x [rows, k] and y [rows, n]; `weight` is a
    `PackedLinear.description`, `sums` what `block_sums` makes of x, if it has offsets.

    Meanwhile the adapters' weights for these sites, which are needed next and for which memory would be too slow,
    are fetched: of each tile's slot `tiles[:, 0]` the `sizes` bytes at `starts`, cut in pieces, in the order in
    which threads will read them.
    """
    n, k = weight["out_features"], weight["in_features"]
    tasks = n // FEATURES * ((rows + PANEL - 1) // PANEL)
    _kernels[form](
        tasks, x, y, rows, weight["codes"], n, k, weight["weight"], weight["absmax"], weight["offsets"],
        weight["scale_stride"], sums, weight["block"], weight["bias"], tiles, starts, sizes,
    )  # fmt: skip
