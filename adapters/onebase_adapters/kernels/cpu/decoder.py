"""All layers of a decoder in one call. From Python, each kernel's call costs two to five microseconds, and with a
single stream its two to three hundred calls a step cost more than the arithmetic that two cores share.

The kernels are the same, in the same order, as in `model.fused`: that is where to read what a layer does.
"""

import numpy as np
from numba import carray, njit

from onebase_adapters.kernels.cpu.elementwise import add_rms_norm, rope_attend, silu_mul
from onebase_adapters.kernels.cpu.lowrank import add_low_rank
from onebase_adapters.kernels.cpu.matmul4bit import multiply
from onebase_adapters.kernels.cpu.vector import f32_pointer, i64_pointer

PROJECTION = 14
"""Numbers of a projection in a layer's row: what `PackedLinear.numbers` and `LowRankTable.numbers` give."""
PROJECTIONS = 4
"""Where they begin, after the addresses of two norms' weights and of the layer's keys and values."""


@njit(cache=True, nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _project(x: int, y: int, rows: int, numbers: np.ndarray, tiles: np.ndarray) -> None:
    """A projection of x [rows, in] to y [rows, out], with the updates of each row's slot."""
    n, k, sites, slots = numbers[1], numbers[2], numbers[6], numbers[7]
    a = carray(i64_pointer(numbers[9]), (slots,), np.int64)
    spans = carray(i64_pointer(numbers[13]), (slots,), np.int64)
    multiply(x, y, rows, numbers[0], n, k, numbers[3], numbers[4], numbers[5], tiles, a, spans)
    if tiles.shape[0] > 0:
        add_low_rank(
            x, k, y, n, k, carray(i64_pointer(numbers[8]), (sites + 1,), np.int64), tiles, a,
            carray(i64_pointer(numbers[10]), (sites, slots), np.int64),
            carray(i64_pointer(numbers[11]), (sites, slots), np.int64),
            carray(f32_pointer(numbers[12]), (sites, slots), np.float32),
        )  # fmt: skip


@njit(cache=True, nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def run_layers(
    layers: np.ndarray,
    x: int,
    rows: int,
    hidden: int,
    intermediate: int,
    eps: float,
    heads: int,
    kv_heads: int,
    dim: int,
    scale: float,
    window: int,
    cos: int,
    sin: int,
    buffers: np.ndarray,
    tiles: np.ndarray,
    slots: np.ndarray,
    items: np.ndarray,
    positions: np.ndarray,
    visible: np.ndarray,
    tables: np.ndarray,
) -> None:
    """x [rows, hidden] through all layers, but for the last one's MLP output, which is left in the buffer `change`.

    `layers` [layers, 4 + 4 * PROJECTION] int64; `buffers` [6] int64, addresses of normed, qkv, attended, change,
    gate_up and activated; the rest as in `rope_attend`.
    """
    normed, qkv, attended, change, gate_up, activated = buffers
    for index in range(layers.shape[0]):
        layer = layers[index]
        at = PROJECTIONS
        add_rms_norm(x, 0 if index == 0 else change, layer[0], normed, rows, hidden, eps)
        _project(normed, qkv, rows, layer[at : at + PROJECTION], tiles)
        rope_attend(
            qkv, cos, sin, attended, layer[2], layer[3], heads, kv_heads, dim, scale, window,
            slots, items, positions, visible, tables,
        )  # fmt: skip
        _project(attended, change, rows, layer[at + PROJECTION : at + 2 * PROJECTION], tiles)
        add_rms_norm(x, change, layer[1], normed, rows, hidden, eps)
        _project(normed, gate_up, rows, layer[at + 2 * PROJECTION : at + 3 * PROJECTION], tiles)
        silu_mul(gate_up, activated, rows, intermediate)
        _project(activated, change, rows, layer[at + 3 * PROJECTION : at + 4 * PROJECTION], tiles)
