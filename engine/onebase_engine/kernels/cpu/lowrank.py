"""Low-rank updates for a batch in which every token may have another adapter: y += scale * B (A x), by slot.

Tokens of one slot go through in tiles of up to four, so that an adapter's weights are read once for them. A and B
are kept transposed, [in, rank] and [rank, out], each slot with its own rank: nothing is padded to the largest. They
lie in pairs of rows (see `pairs`), B besides in groups of columns, so that both are read from beginning to end:
memory is faster at that. What lies between A and B is rounded to bfloat16, as PEFT's is.

Invariant: a token's update is summed in the same order whatever else is in its tile (see `pairs`).
"""

import numpy as np
from numba import carray, njit, types

from onebase_engine.kernels.cpu.pairs import add_scaled, narrow_rows, pair_tile
from onebase_engine.kernels.cpu.task import WHOLE, Arguments, array
from onebase_engine.kernels.cpu.vector import bf16_from_f32, f32_from_bf16, u16_pointer

TILE = 4
"""Tokens in a tile, at most."""
SERIAL_TILES = 1
"""Up to so many are not worth waking the other threads."""
GROUP = 64
"""Columns of B that lie together."""

# Same unroll for one row and for four, so that both give the same bits.
_shrink_four = pair_tile(rows=4, groups=1, unroll=4, paired=True)
_shrink_one = pair_tile(rows=1, groups=1, unroll=4, paired=True)
_expand_four = pair_tile(rows=4, groups=4, unroll=1, paired=True)
_expand_one = pair_tile(rows=1, groups=4, unroll=1, paired=True)
_expand_part_four = pair_tile(rows=4, groups=1, unroll=1, paired=True)
_expand_part_one = pair_tile(rows=1, groups=1, unroll=1, paired=True)

UPDATE = Arguments(
    *[WHOLE] * 5, array(types.int64), array(types.int32, 2), array(types.int64), array(types.int64, 2),
    array(types.int64, 2), array(types.float32, 2),
)  # fmt: skip
"""As `add_low_rank` has them."""
_read = UPDATE.read


@njit(nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def rows_of(tiles: np.ndarray, tile: int) -> int:
    """How many tokens a tile has."""
    rows = 0
    for t in range(TILE):
        if tiles[tile, 1 + t] >= 0:
            rows += 1
    return rows


@njit(nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def gather(tiles: np.ndarray, tile: int, rows: int, x: int, x_stride: int, width: int, inputs: np.ndarray) -> None:
    """The rows of x (bfloat16) that belong to a tile's tokens, one after the other, then zeros."""
    inputs[rows * width :] = np.uint16(0)
    for t in range(rows):
        row = carray(u16_pointer(x + 2 * tiles[tile, 1 + t] * x_stride), width, np.uint16)
        target = inputs[t * width : (t + 1) * width]
        for i in range(width):  # a slice's assignment is not vectorised
            target[i] = row[i]


@UPDATE.work
def update_tile(tile: int, at: int) -> None:
    """One tile of `add_low_rank`."""
    x, x_stride, y, y_stride, in_features, columns, tiles, a, b, ranks, scales = _read(at)
    sites = columns.shape[0] - 1
    slot = tiles[tile, 0]
    # A tile is over sooner than its weights come from memory, so each brings in the next one's.
    following = tiles[min(tile + 1, tiles.shape[0] - 1), 0]
    total = 0
    for site in range(sites):
        total += ranks[site, slot]
    if total > 0:
        rows = rows_of(tiles, tile)
        computed = 1 if rows == 1 else TILE
        width = (total + 15) // 16 * 16
        wide = np.empty(computed * (width + GROUP), np.float32)
        sums, delta = wide[: computed * width], wide[computed * width :]
        narrow = np.empty(computed * (in_features + width), np.uint16)
        inputs, hidden = narrow[: computed * in_features], narrow[computed * in_features :]
        at = inputs.ctypes.data
        if rows == 1:
            at = x + 2 * tiles[tile, 1] * x_stride
        else:
            gather(tiles, tile, rows, x, x_stride, in_features, inputs)

        pairs, stride = in_features // 2, 2 * total
        ahead = a[following] - a[slot]
        for r in range(0, total, 16):
            c, weights = sums.ctypes.data + 4 * r, a[slot] + 4 * r
            if rows == 1:
                _shrink_one(c, width, at, in_features, weights, stride, 0, pairs, ahead)
            else:
                _shrink_four(c, width, at, in_features, weights, stride, 0, pairs, ahead)
        if total < width:
            # An odd rank's last one is paired with what comes next, which meets zeros in B, but must be a number.
            for t in range(computed):
                sums[t * width + total] = np.float32(0.0)
        narrow_rows(hidden.ctypes.data, sums.ctypes.data, computed * width)

        first = 0
        for site in range(sites):
            rank = ranks[site, slot]
            if rank > 0:
                out_features = columns[site + 1] - columns[site]
                h = hidden.ctypes.data + 2 * first
                pairs = (rank + 1) // 2
                ahead = b[site, following] - b[site, slot]
                scale = scales[site, slot]
                for o in range(0, out_features, GROUP):
                    # All groups before this one are whole.
                    weights = b[site, slot] + 4 * o * pairs
                    present = min(GROUP, out_features - o)
                    wide_part = (present + 15) // 16 * 16
                    c, stride = delta.ctypes.data, 2 * wide_part
                    if wide_part == GROUP and rows == 1:
                        _expand_one(c, GROUP, h, width, weights, stride, 0, pairs, ahead)
                    elif wide_part == GROUP:
                        _expand_four(c, GROUP, h, width, weights, stride, 0, pairs, ahead)
                    else:
                        for part in range(0, wide_part, 16):
                            some = weights + 4 * part
                            if rows == 1:
                                _expand_part_one(c + 4 * part, GROUP, h, width, some, stride, 0, pairs, ahead)
                            else:
                                _expand_part_four(c + 4 * part, GROUP, h, width, some, stride, 0, pairs, ahead)
                    whole = present // 16 * 16
                    for t in range(rows):
                        start = y + 2 * (tiles[tile, 1 + t] * y_stride + columns[site] + o)
                        add_scaled(start, delta.ctypes.data + 4 * t * GROUP, scale, whole)
                        target = carray(u16_pointer(start), present, np.uint16)
                        change = delta[t * GROUP : t * GROUP + present]
                        for i in range(whole, present):
                            target[i] = bf16_from_f32(f32_from_bf16(target[i]) + scale * change[i])
                first += rank


_update = UPDATE.kernel(update_tile, serial=SERIAL_TILES)


def add_low_rank(
    x: int, x_stride: int, y: int, y_stride: int, in_features: int, columns: np.ndarray, tiles: np.ndarray,
    a: np.ndarray, b: np.ndarray, ranks: np.ndarray, scales: np.ndarray,
) -> None:  # fmt: skip
    """y[t, columns[s]:columns[s+1]] += scales[s, slot] * B[s, slot] (A[s, slot] x[t]) for each site s.

    `x`, `y` are addresses of bfloat16 rows with the given strides (elements). `columns` [sites + 1] int64 are the
    sites' column ranges in y. `tiles` [n, 1 + TILE] int32: slot, then token indices, -1 where there are fewer.
    By slot: `a` [slots] int64, address of the sites' A side by side, transposed [in, sum of ranks]; and by site
    and slot: `b` [sites, slots] int64, address of B transposed [rank, out] in groups of `GROUP` columns, both as
    `table.in_pairs` puts them; `ranks` int64 (0: site untouched); `scales` float32. in_features even.
    """
    _update(len(tiles), x, x_stride, y, y_stride, in_features, columns, tiles, a, b, ranks, scales)
