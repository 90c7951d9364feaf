"""Paged attention on CPUs: one kernel for prefill and decode, because both are rows of queries over blocks.

A work item is a run of a sequence's query tokens with one key-value head; its rows are (token, query head)
pairs. Scores of a whole row are kept, so the softmax is the plain two-pass one. Keys lie transposed in their
block ([dim, 16 tokens]) and values straight ([16 tokens, dim]), so that both products are `matmul_tile`s.

Invariant: a row sees only its own sequence's keys, block by block from the first, and everything is summed
per lane in that order; so its result does not depend on chunking, on its neighbours, or on prefix reuse.
"""

import numpy as np
from numba import carray, njit, prange

from onebase_adapters.kernels.block import BLOCK
from onebase_adapters.kernels.cpu.vector import (
    bf16_from_f32,
    f32_from_bf16,
    larger,
    matmul_tile,
    power_of_two,
    u16_pointer,
)
from onebase_adapters.kernels.tiles import query_tiles

NO_WINDOW = 1 << 30

AHEAD = 4
"""Pages between the one that is worked on and the one that is being fetched: a page takes a third of the time that
memory takes to answer, and pages lie anywhere, so that nothing but the table tells which is next."""

_scores_tile = matmul_tile(rows=4, groups=1, unroll=4, prefetch=True)
_values_tile_wide = matmul_tile(rows=4, groups=4, unroll=1, prefetch=True)
_values_tile = matmul_tile(rows=4, groups=1, unroll=1, prefetch=True)


@njit(cache=True, nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _page(tables: np.ndarray, kv_heads: int, sequence: int, block: int, head: int) -> np.int64:
    """Number of the page of a sequence's block and head, in a cache of [blocks, kv_heads] pages."""
    number: np.int64 = np.int64(tables[sequence, min(block, tables.shape[1] - 1)]) * kv_heads + head
    return number


@njit(cache=True, nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def exp_nonpositive(x: np.float32) -> np.float32:
    """e**x for x <= 0 to 2 units in the last place, in operations that LLVM vectorises."""
    x = max(x, np.float32(-87.0))
    n = np.floor(x * np.float32(1.4426950408889634) + np.float32(0.5))
    r = x - n * np.float32(0.693359375)
    r = r + n * np.float32(2.12194440e-4)
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    p = p * r * r + r + np.float32(1.0)
    scaled: np.float32 = p * power_of_two(n)
    return scaled


# A maximum is the same in any order, so here alone reassociation is allowed.
@njit(cache=True, nogil=True, error_model="numpy", fastmath=True)  # type: ignore[untyped-decorator]
def _row_max(row: np.ndarray) -> np.float32:
    highest = np.float32(-3.0e38)
    for i in range(row.shape[0]):
        highest = larger(highest, row[i])
    return highest


@njit(cache=True, nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _softmax_row(row: np.ndarray, first: int, last: int, lanes: np.ndarray) -> np.float32:
    """Exponentiate row[first..last] against its maximum, zero the rest, and return the sum (lane by lane)."""
    # Slices with plain indices: numba vectorises those, not indices that might be negative.
    row[:first] = np.float32(0.0)
    row[last + 1 :] = np.float32(0.0)
    seen = row[first : last + 1]
    highest = _row_max(seen)
    for i in range(seen.shape[0]):
        seen[i] = exp_nonpositive(seen[i] - highest)
    for j in range(BLOCK):
        lanes[j] = np.float32(0.0)
    for block in range(first // BLOCK, row.shape[0] // BLOCK):
        for j in range(BLOCK):
            lanes[j] += row[block * BLOCK + j]
    total = np.float32(0.0)
    for j in range(BLOCK):
        total += lanes[j]
    return total


@njit(cache=True, nogil=True, error_model="numpy", parallel=True)  # type: ignore[untyped-decorator]
def attend(
    q: int,
    q_stride: int,
    out: int,
    out_stride: int,
    k_cache: int,
    v_cache: int,
    kv_heads: int,
    group: int,
    dim: int,
    scale: float,
    window: int,
    items: np.ndarray,
    positions: np.ndarray,
    visible: np.ndarray,
    tables: np.ndarray,
) -> None:
    """out[t, h] = softmax(scale * q[t, h] K) V over the keys at positions <= visible[t], in t's sequence.

    `q`, `out`, `k_cache`, `v_cache` are addresses of bfloat16: q and out [T, kv_heads*group, dim] with the
    given strides per token (in elements), k_cache [blocks, kv_heads, dim, 16], v_cache [blocks, kv_heads, 16,
    dim]; dim a multiple of 16. `items` [n, 4] int32: (sequence, first token, tokens, kv head); `positions` and
    `visible` [T] int64; `tables` [S, blocks] int32. With a window w, only the last w positions are seen.
    """
    for item in prange(items.shape[0]):
        sequence, first_token, tokens, head = items[item, 0], items[item, 1], items[item, 2], items[item, 3]
        rows = tokens * group
        padded = (rows + 3) // 4 * 4
        last = visible[first_token + tokens - 1]
        start_block = max(0, positions[first_token] - window + 1) // BLOCK
        blocks = last // BLOCK + 1 - start_block
        keys = blocks * BLOCK
        base = start_block * BLOCK
        page_bytes = 2 * dim * BLOCK
        following = min(item + 1, items.shape[0] - 1)
        next_sequence, next_head = items[following, 0], items[following, 3]
        next_start = max(0, positions[items[following, 1]] - window + 1) // BLOCK

        queries = np.zeros((padded, dim), np.float32)
        for t in range(tokens):
            source = carray(
                u16_pointer(q + 2 * ((first_token + t) * q_stride + head * group * dim)), group * dim, np.uint16
            )
            for g in range(group):
                for d in range(dim):
                    queries[t * group + g, d] = f32_from_bf16(source[g * dim + d]) * np.float32(scale)

        scores = np.zeros((padded, keys), np.float32)
        for block in range(blocks):
            page = k_cache + _page(tables, kv_heads, sequence, start_block + block, head) * page_bytes
            # After the last keys come the first values.
            if block + AHEAD < blocks:
                coming = k_cache + _page(tables, kv_heads, sequence, start_block + block + AHEAD, head) * page_bytes
            else:
                first = start_block + block + AHEAD - blocks
                coming = v_cache + _page(tables, kv_heads, sequence, first, head) * page_bytes
            for r in range(0, padded, 4):
                c, a = scores.ctypes.data + 4 * (r * keys + block * BLOCK), queries.ctypes.data + 4 * r * dim
                _scores_tile(c, keys, a, dim, page, BLOCK, dim, coming - page if r == 0 else 0)

        lanes = np.empty(BLOCK, np.float32)
        sums = np.ones(padded, np.float32)
        for r in range(rows):
            token = first_token + r // group
            position, end = positions[token], visible[token]
            sums[r] = _softmax_row(scores[r], max(0, position - window + 1 - base), end - base, lanes)

        results = np.zeros((padded, dim), np.float32)
        for block in range(blocks):
            page = v_cache + _page(tables, kv_heads, sequence, start_block + block, head) * page_bytes
            # After the last values come the next item's first keys.
            if block + AHEAD < blocks:
                coming = v_cache + _page(tables, kv_heads, sequence, start_block + block + AHEAD, head) * page_bytes
            else:
                first = next_start + block + AHEAD - blocks
                coming = k_cache + _page(tables, kv_heads, next_sequence, first, next_head) * page_bytes
            # Not past the last key: what lies behind it in the block may be another request's leftovers.
            depth = min(BLOCK, last + 1 - base - block * BLOCK)
            for r in range(0, padded, 4):
                ahead = coming - page if r == 0 else 0
                c = results.ctypes.data + 4 * r * dim
                a = scores.ctypes.data + 4 * (r * keys + block * BLOCK)
                if dim % 64 == 0:
                    for d in range(0, dim, 64):
                        _values_tile_wide(c + 4 * d, dim, a, keys, page + 2 * d, dim, depth, ahead)
                else:
                    for d in range(0, dim, 16):
                        _values_tile(c + 4 * d, dim, a, keys, page + 2 * d, dim, depth, ahead)

        for t in range(tokens):
            target = carray(
                u16_pointer(out + 2 * ((first_token + t) * out_stride + head * group * dim)),
                group * dim,
                np.uint16,
            )
            for g in range(group):
                inverse = np.float32(1.0) / sums[t * group + g]
                for d in range(dim):
                    target[g * dim + d] = bf16_from_f32(results[t * group + g, d] * inverse)


@njit(cache=True, nogil=True, error_model="numpy", parallel=True)  # type: ignore[untyped-decorator]
def write_kv(
    k: int,
    k_stride: int,
    v: int,
    v_stride: int,
    k_cache: int,
    v_cache: int,
    kv_heads: int,
    dim: int,
    slots: np.ndarray,
) -> None:
    """Put each token's key and value [kv_heads, dim] (bfloat16, at the given strides per token, in elements)
    at its cache slot (block * 16 + offset), `slots` [T] int64."""
    for t in prange(slots.shape[0]):
        block, offset = slots[t] // BLOCK, slots[t] % BLOCK
        key = carray(u16_pointer(k + 2 * t * k_stride), kv_heads * dim, np.uint16)
        value = carray(u16_pointer(v + 2 * t * v_stride), kv_heads * dim, np.uint16)
        pages = kv_heads * dim * BLOCK
        key_page = carray(u16_pointer(k_cache + 2 * block * pages), pages, np.uint16)
        value_page = carray(u16_pointer(v_cache + 2 * block * pages), pages, np.uint16)
        for h in range(kv_heads):
            for d in range(dim):
                key_page[(h * dim + d) * BLOCK + offset] = key[h * dim + d]
                value_page[(h * BLOCK + offset) * dim + d] = value[h * dim + d]


def attention_items(query_start: np.ndarray, visible: np.ndarray, kv_heads: int, threads: int) -> np.ndarray:
    """Cut a batch into work items [n, 4] int32, dealt so that each thread's contiguous share costs the same.

    `query_start` [S + 1]: sequence s has the tokens query_start[s]..query_start[s+1].
    """
    tiles = query_tiles(query_start)
    cost = (visible[tiles[:, 1] + tiles[:, 2] - 1] + 1) * tiles[:, 2]
    tiles = tiles[np.argsort(-cost, kind="stable")]
    items = np.empty((len(tiles) * kv_heads, 4), np.int32)
    items[:, :3] = np.repeat(tiles, kv_heads, axis=0)
    items[:, 3] = np.tile(np.arange(kv_heads, dtype=np.int32), len(tiles))
    if threads == 1:
        return items
    return np.concatenate([items[start::threads] for start in range(threads)])
