"""Bottleneck adapters for a batch in which every token may have another: y += scale * up(act(down(x))), by slot.

Built as the low-rank kernel is, of the same tiles and with the same invariant, with an activation in the middle.
"""

import math

import numpy as np
from numba import carray, njit, types

from onebase_engine.kernels.cpu.lowrank import TILE, gather, rows_of
from onebase_engine.kernels.cpu.pairs import pair_tile
from onebase_engine.kernels.cpu.task import WHOLE, Arguments, array
from onebase_engine.kernels.cpu.vector import bf16_from_f32, f32_from_bf16, f32_pointer, u16_pointer

# Same unroll for one row and for four, so that both give the same bits.
_down_four = pair_tile(rows=4, groups=1, unroll=4, paired=False)
_down_one = pair_tile(rows=1, groups=1, unroll=4, paired=False)
_up_four = pair_tile(rows=4, groups=1, unroll=1, paired=False, accumulate=True)
_up_one = pair_tile(rows=1, groups=1, unroll=1, paired=False, accumulate=True)

BOTTLENECK = Arguments(*[WHOLE] * 3, array(types.int32, 2), *[array(types.int64)] * 6, array(types.float32))
"""As `add_bottleneck` has them."""
_read = BOTTLENECK.read


@njit(nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _activate(x: np.float32, code: int) -> np.float32:
    """`code`: the activation's place in `primitives.ACTIVATIONS`."""
    if code == 1:
        return max(x, np.float32(0.0))
    if code == 2:
        return x * np.float32(0.5) * np.float32(1.0 + math.erf(x * 0.7071067811865476))
    if code == 3:
        inner = np.float32(0.7978845608028654) * (x + np.float32(0.044715) * x * x * x)
        return np.float32(0.5) * x * (np.float32(1.0) + np.float32(math.tanh(inner)))
    if code == 4:
        return x / (np.float32(1.0) + np.float32(math.exp(-x)))
    if code == 5:
        return np.float32(math.tanh(x))
    return x


@BOTTLENECK.work
def _bottleneck_tile(tile: int, at: int) -> None:
    x, y, width, tiles, down, down_bias, up, up_bias, ranks, activations, scales = _read(at)
    slot = tiles[tile, 0]
    rank = ranks[slot]
    if rank > 0:
        rows = rows_of(tiles, tile)
        computed = 1 if rows == 1 else TILE
        wide = (rank + 15) // 16 * 16
        padded = (width + 15) // 16 * 16
        # Sums [computed, wide] and delta [computed, padded]; inputs [computed, width] and hidden [computed,
        # wide].
        floats = np.empty(computed * (wide + padded), np.float32)
        sums, delta = floats[: computed * wide], floats[computed * wide :]
        words = np.zeros(computed * (width + wide), np.uint16)
        inputs, hidden = words[: computed * width], words[computed * width :]
        gather(tiles, tile, rows, x, width, width, inputs)
        for r in range(0, rank, 16):
            c, weights = sums.ctypes.data + 4 * r, down[slot] + 2 * r
            if rows == 1:
                _down_one(c, wide, inputs.ctypes.data, width, weights, 2 * rank, rank, width // 2, 0)
            else:
                _down_four(c, wide, inputs.ctypes.data, width, weights, 2 * rank, rank, width // 2, 0)
        biases = carray(f32_pointer(down_bias[slot]), rank, np.float32)
        for t in range(rows):
            for r in range(rank):
                hidden[t * wide + r] = bf16_from_f32(_activate(sums[t * wide + r] + biases[r], activations[slot]))
        delta[:] = np.float32(0.0)
        h = hidden.ctypes.data
        # An odd rank's last one is paired with itself; what it is multiplied by, past the rank, is zero.
        odd, last = rank % 2, 2 * (rank - 1)
        for o in range(0, width, 16):
            c, weights = delta.ctypes.data + 4 * o, up[slot] + 2 * o
            if rows == 1:
                _up_one(c, padded, h, wide, weights, 2 * width, width, rank // 2, 0)
                _up_one(c, padded, h + last, wide, weights + last * width, 0, 0, odd, 0)
            else:
                _up_four(c, padded, h, wide, weights, 2 * width, width, rank // 2, 0)
                _up_four(c, padded, h + last, wide, weights + last * width, 0, 0, odd, 0)
        terms = carray(f32_pointer(up_bias[slot]), width, np.float32)
        scale = scales[slot]
        for t in range(rows):
            sums = carray(u16_pointer(y + 2 * tiles[tile, 1 + t] * width), width, np.uint16)
            change = delta[t * padded : t * padded + width]
            for o in range(width):
                sums[o] = bf16_from_f32(f32_from_bf16(sums[o]) + scale * (change[o] + terms[o]))


_all_tiles = BOTTLENECK.kernel(_bottleneck_tile)


def add_bottleneck(
    x: int, y: int, width: int, tiles: np.ndarray, down: np.ndarray, down_bias: np.ndarray, up: np.ndarray,
    up_bias: np.ndarray, ranks: np.ndarray, activations: np.ndarray, scales: np.ndarray,
) -> None:  # fmt: skip
    """y[t] += scale * (up @ act(down @ x[t] + down_bias) + up_bias), by the slot of row t.

    `x` and `y` are addresses of bfloat16 [rows, width], and may be the same. `tiles` as `low_rank_tiles` makes
    them. By slot [slots]: `down` and `up`, addresses of the transposed weights [width, rank] and [rank, width]
    (bfloat16); `down_bias`, `up_bias`, addresses of float32; `ranks` (0: untouched) and `activations` (places in
    `primitives.ACTIVATIONS`) int64; `scales` float32.
    width even.
    """
    _all_tiles(len(tiles), x, y, width, tiles, down, down_bias, up, up_bias, ranks, activations, scales)
