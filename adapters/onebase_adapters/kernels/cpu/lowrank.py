"""Low-rank updates for a batch in which every token may have another adapter: y += scale * B (A x), by slot.

Tokens of one slot go through in tiles of up to four, so that an adapter's weights are read once for them. A and
B are kept transposed, [in, rank] and [rank, out], each slot with its own rank: nothing is padded to the largest.
B lies in groups of columns, so that it is read from its beginning to its end: memory is faster at that.

Invariant: a token's update is summed in the same order whatever else is in its tile (see `vector`).
"""

import numpy as np
from numba import carray, njit, prange

from onebase_adapters.kernels.cpu.vector import bf16_from_f32, f32_from_bf16, matmul_tile, u16_pointer

TILE = 4
"""Tokens in a tile, at most."""
SERIAL_TILES = 1
"""Up to so many are not worth waking the other threads."""
GROUP = 64
"""Columns of B that lie together."""

# Same unroll for one row and for four, so that both give the same bits.
shrink_four = matmul_tile(rows=4, groups=1, unroll=4, prefetch=True)
shrink_one = matmul_tile(rows=1, groups=1, unroll=4, prefetch=True)
expand_four = matmul_tile(rows=4, groups=4, unroll=1, prefetch=True)
expand_one = matmul_tile(rows=1, groups=4, unroll=1, prefetch=True)
_expand_part_four = matmul_tile(rows=4, groups=1, unroll=1, prefetch=True)
_expand_part_one = matmul_tile(rows=1, groups=1, unroll=1, prefetch=True)


@njit(cache=True, nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _update(
    tile: int,
    x: int,
    x_stride: int,
    y: int,
    y_stride: int,
    in_features: int,
    columns: np.ndarray,
    tiles: np.ndarray,
    a: np.ndarray,
    b: np.ndarray,
    ranks: np.ndarray,
    scales: np.ndarray,
) -> None:
    """One tile's part of `add_low_rank`."""
    sites = columns.shape[0] - 1
    slot = tiles[tile, 0]
    # A tile is over sooner than its weights come from memory, so each brings in the next one's.
    following = tiles[min(tile + 1, tiles.shape[0] - 1), 0]
    total = 0
    for site in range(sites):
        total += ranks[site, slot]
    if total > 0:
        rows = 0
        for t in range(TILE):
            if tiles[tile, 1 + t] >= 0:
                rows += 1
        computed = 1 if rows == 1 else TILE
        width = (total + 15) // 16 * 16
        # One allocation for inputs [computed, in], hidden [computed, width] and delta [computed, GROUP].
        work = np.empty(computed * (in_features + width + GROUP), np.float32)
        inputs = work[: computed * in_features]
        hidden = work[computed * in_features : computed * (in_features + width)]
        delta = work[computed * (in_features + width) :]
        inputs[rows * in_features :] = np.float32(0.0)
        for t in range(rows):
            row = carray(u16_pointer(x + 2 * tiles[tile, 1 + t] * x_stride), in_features, np.uint16)
            target = inputs[t * in_features : (t + 1) * in_features]
            for i in range(in_features):
                target[i] = f32_from_bf16(row[i])

        hidden[:] = np.float32(0.0)
        ahead = a[following] - a[slot]
        for r in range(0, total, 16):
            c, weights = hidden.ctypes.data + 4 * r, a[slot] + 2 * r
            if rows == 1:
                shrink_one(c, width, inputs.ctypes.data, in_features, weights, total, in_features, ahead)
            else:
                shrink_four(c, width, inputs.ctypes.data, in_features, weights, total, in_features, ahead)

        first = 0
        for site in range(sites):
            rank = ranks[site, slot]
            if rank > 0:
                out_features = columns[site + 1] - columns[site]
                h = hidden.ctypes.data + 4 * first
                ahead = b[site, following] - b[site, slot]
                scale = scales[site, slot]
                for o in range(0, out_features, GROUP):
                    # All groups before this one are whole.
                    weights = b[site, slot] + 2 * o * rank
                    present = min(GROUP, out_features - o)
                    wide = (present + 15) // 16 * 16
                    delta[:] = np.float32(0.0)
                    if wide == GROUP and rows == 1:
                        expand_one(delta.ctypes.data, GROUP, h, width, weights, GROUP, rank, ahead)
                    elif wide == GROUP:
                        expand_four(delta.ctypes.data, GROUP, h, width, weights, GROUP, rank, ahead)
                    else:
                        for part in range(0, wide, 16):
                            c, some = delta.ctypes.data + 4 * part, weights + 2 * part
                            if rows == 1:
                                _expand_part_one(c, GROUP, h, width, some, wide, rank, ahead)
                            else:
                                _expand_part_four(c, GROUP, h, width, some, wide, rank, ahead)
                    for t in range(rows):
                        start = y + 2 * (tiles[tile, 1 + t] * y_stride + columns[site] + o)
                        sums = carray(u16_pointer(start), present, np.uint16)
                        change = delta[t * GROUP : t * GROUP + present]
                        for i in range(present):
                            sums[i] = bf16_from_f32(f32_from_bf16(sums[i]) + scale * change[i])
            first += rank


@njit(cache=True, nogil=True, error_model="numpy", parallel=True)  # type: ignore[untyped-decorator]
def _update_all(
    x: int,
    x_stride: int,
    y: int,
    y_stride: int,
    in_features: int,
    columns: np.ndarray,
    tiles: np.ndarray,
    a: np.ndarray,
    b: np.ndarray,
    ranks: np.ndarray,
    scales: np.ndarray,
) -> None:
    for tile in prange(tiles.shape[0]):
        _update(tile, x, x_stride, y, y_stride, in_features, columns, tiles, a, b, ranks, scales)


@njit(cache=True, nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def add_low_rank(
    x: int,
    x_stride: int,
    y: int,
    y_stride: int,
    in_features: int,
    columns: np.ndarray,
    tiles: np.ndarray,
    a: np.ndarray,
    b: np.ndarray,
    ranks: np.ndarray,
    scales: np.ndarray,
) -> None:
    """y[t, columns[s]:columns[s+1]] += scales[s, slot] * B[s, slot] (A[s, slot] x[t]) for each site s.

    `x`, `y` are addresses of bfloat16 rows with the given strides (elements). `columns` [sites + 1] int64 are the
    sites' column ranges in y. `tiles` [n, 1 + TILE] int32: slot, then token indices, -1 where there are fewer.
    By slot: `a` [slots] int64, address of the sites' A side by side, transposed [in, sum of ranks]; and by site
    and slot: `b` [sites, slots] int64, address of B transposed [rank, out] as `group_columns` puts it; `ranks`
    int64 (0: site untouched); `scales` float32. in_features a multiple of 4.
    """
    if tiles.shape[0] > SERIAL_TILES:
        _update_all(x, x_stride, y, y_stride, in_features, columns, tiles, a, b, ranks, scales)
    else:
        for tile in range(tiles.shape[0]):
            _update(tile, x, x_stride, y, y_stride, in_features, columns, tiles, a, b, ranks, scales)
