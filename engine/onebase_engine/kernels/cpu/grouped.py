"""The product of rows with one of many 4-bit weights each, as a mixture's experts need it: one kernel call for all.

Rows come sorted by weight. Each task is one of `matmul4bit`'s, for the weight that it belongs to, so a row has the
same bits as in a product of its own.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numba import types

from onebase_engine.kernels.cpu.matmul4bit import MULTIPLY, PANEL, TASKS
from onebase_engine.kernels.cpu.packed import PackedLinear
from onebase_engine.kernels.cpu.task import WHOLE, Arguments, array, invoke
from onebase_engine.kernels.cpu.tile4bit import FEATURES, Form

GROUPED = Arguments(
    *[WHOLE] * 9, array(types.int64), array(types.int64), array(types.int32, 2), array(types.int64)
)  # fmt: skip
"""Address of the product's work; x, y, codes, n, k, weight, absmax and block as in `matmul4bit`, of the first
weight; by weight, the number of tasks up to its end, and `bounds`; and no tiles."""
_read, _write = GROUPED.read, MULTIPLY.write


@GROUPED.work
def _part(task: int, at: int) -> None:
    """One task of one of the products."""
    product, x, y, codes, n, k, weight, absmax, block, ends, bounds, no_tiles, nothing = _read(at)
    which = np.searchsorted(ends, task, side="right")
    before = 0 if which == 0 else ends[which - 1]
    first, rows, weights = bounds[which], bounds[which + 1] - bounds[which], ends.shape[0]
    arguments = _write((
        x + 2 * first * k, y + 2 * first * n, rows, codes, n, k, weight + which * n * (k // 2),
        absmax + 2 * which * n, 0, weights * n, 0, block, 0, no_tiles, nothing, nothing,
    ))  # fmt: skip
    invoke(product, task - before, arguments)


_multiply = GROUPED.kernel(_part)
_NO_TILES, _NOTHING = np.empty((0, 1), np.int32), np.empty(0, np.int64)


class GroupedLinear:
    """Linear modules in bitsandbytes' 4 bits, alike, of one size and without biases, as one packed weight."""

    def __init__(self, modules: Sequence[Any]) -> None:
        self._packed = PackedLinear(modules)
        self._out_features: int = modules[0].out_features
        self._product = TASKS[Form()].address

    def __call__(self, rows: torch.Tensor, bounds: Sequence[int]) -> torch.Tensor:
        """See `interface.Grouped`; bfloat16."""
        packed, out = self._packed.description, self._out_features
        x, y = rows.contiguous(), torch.empty(len(rows), out, dtype=torch.bfloat16)
        firsts = np.array(bounds, np.int64)
        ends = np.cumsum(-(-np.diff(firsts) // PANEL) * (out // FEATURES))
        _multiply(
            int(ends[-1]), self._product, x.data_ptr(), y.data_ptr(), packed["codes"], out, packed["in_features"],
            packed["weight"], packed["absmax"], packed["block"], ends, firsts, _NO_TILES, _NOTHING,
        )  # fmt: skip
        return y
