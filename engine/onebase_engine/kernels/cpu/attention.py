"""Paged attention on CPUs: one kernel for prefill and decode, because both are rows of queries over blocks.

A work item is a run of a sequence's query tokens with one key-value head; its rows are (token, query head)
pairs. Scores of a whole row are kept, so the softmax is the plain two-pass one. Keys lie transposed in their
block ([dim, 16 tokens]) and values straight ([16 tokens, dim]), so that both products are `pair_tile`s. Weights of
the softmax are rounded to bfloat16, as in transformers' own attention.

Invariant: a row sees only its own sequence's keys, block by block from the first, and everything is summed
per lane in that order; so its result does not depend on chunking, on its neighbours, or on prefix reuse.
"""

import numpy as np
from numba import carray, njit, types

from onebase_engine.kernels.batch import BLOCK
from onebase_engine.kernels.cpu.pairs import pair_tile
from onebase_engine.kernels.cpu.task import NUMBER, WHOLE, Arguments, array
from onebase_engine.kernels.cpu.vector import bf16_from_f32, larger, power_of_two, u16_pointer
from onebase_engine.kernels.tiles import query_tiles

NO_WINDOW = 1 << 30

AHEAD = 4
"""Pages between the one that is worked on and the one that is being fetched: a page takes a third of the time that
memory takes to answer, and pages lie anywhere, so that nothing but the table tells which is next."""

# Same unroll for four rows and for eight, so that both give the same bits.
_scores_four = pair_tile(rows=4, groups=1, unroll=2, paired=False)
_scores_eight = pair_tile(rows=8, groups=1, unroll=2, paired=False)
_values_four = pair_tile(rows=4, groups=4, unroll=1, paired=False, accumulate=True)
_values_eight = pair_tile(rows=8, groups=2, unroll=1, paired=False, accumulate=True)
_values_part = pair_tile(rows=4, groups=1, unroll=1, paired=False, accumulate=True)

ATTEND = Arguments(
    *[WHOLE] * 9, NUMBER, WHOLE, array(types.int32, 2), array(types.int64), array(types.int64),
    array(types.int32, 2),
)  # fmt: skip
"""As `attend` has them."""
WRITE = Arguments(*[WHOLE] * 8, array(types.int64))
"""As `write_kv` has them."""
_read, _read_write = ATTEND.read, WRITE.read


@njit(nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _page(tables: np.ndarray, kv_heads: int, sequence: int, block: int, head: int) -> np.int64:
    """Number of the page of a sequence's block and head, in a cache of [blocks, kv_heads] pages."""
    number: np.int64 = np.int64(tables[sequence, min(block, tables.shape[1] - 1)]) * kv_heads + head
    return number


@njit(nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
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
@njit(nogil=True, error_model="numpy", fastmath=True)  # type: ignore[untyped-decorator]
def _row_max(row: np.ndarray) -> np.float32:
    highest = np.float32(-3.0e38)
    for i in range(row.shape[0]):
        highest = larger(highest, row[i])
    return highest


@njit(nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _softmax_row(
    row: np.ndarray, weights: np.ndarray, first: int, last: int, scale: np.float32, lanes: np.ndarray
) -> np.float32:
    """weights = exp(scale * (row - its maximum)) in bfloat16 for first..last, else 0; returns their sum (lane by
    lane). `row` float32 is used up."""
    # Slices with plain indices: numba vectorises those, not indices that might be negative.
    row[:first] = np.float32(0.0)
    row[last + 1 :] = np.float32(0.0)
    seen = row[first : last + 1]
    highest = _row_max(seen)
    for i in range(seen.shape[0]):
        seen[i] = exp_nonpositive((seen[i] - highest) * scale)
    for i in range(row.shape[0]):
        weights[i] = bf16_from_f32(row[i])
    for j in range(BLOCK):
        lanes[j] = np.float32(0.0)
    for block in range(first // BLOCK, row.shape[0] // BLOCK):
        part = row[block * BLOCK : (block + 1) * BLOCK]
        for j in range(BLOCK):
            lanes[j] += part[j]
    total = np.float32(0.0)
    for j in range(BLOCK):
        total += lanes[j]
    return total


@njit(nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _score_page(scores: int, keys: int, queries: int, dim: int, rows: int, page: int, ahead: int) -> None:
    """scores [rows, 16] = queries [rows, dim] x page [dim, 16]; rows a multiple of 4."""
    r = 0
    while r < rows:
        c, a = scores + 4 * r * keys, queries + 2 * r * dim
        if rows - r >= 8:
            _scores_eight(c, keys, a, dim, page, 2 * BLOCK, BLOCK, dim // 2, ahead)
            r += 8
        else:
            _scores_four(c, keys, a, dim, page, 2 * BLOCK, BLOCK, dim // 2, ahead)
            r += 4
        ahead = 0


@njit(nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _add_values(
    results: int, weights: int, keys: int, dim: int, rows: int, page: int, second: int, pairs: int, ahead: int
) -> None:
    """results [rows, dim] += weights [rows, 2 * pairs] x page [2 * pairs, dim]; rows a multiple of 4."""
    r = 0
    while r < rows:
        a = weights + 2 * r * keys
        c = results + 4 * r * dim
        if rows - r >= 8 and dim % 32 == 0:
            for d in range(0, dim, 32):
                _values_eight(c + 4 * d, dim, a, keys, page + 2 * d, 2 * dim, second, pairs, ahead)
            r += 8
        else:
            for d in range(0, dim - dim % 64, 64):
                _values_four(c + 4 * d, dim, a, keys, page + 2 * d, 2 * dim, second, pairs, ahead)
            for d in range(dim - dim % 64, dim, 16):
                _values_part(c + 4 * d, dim, a, keys, page + 2 * d, 2 * dim, second, pairs, ahead)
            r += 4
        ahead = 0


@ATTEND.work
def attend_item(item: int, at: int) -> None:
    """One item of `attend`."""
    (
        q, q_stride, out, out_stride, k_cache, v_cache, kv_heads, group, dim, scale, window, items, positions,
        visible, tables,
    ) = _read(at)  # fmt: skip
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

    # Two allocations for all: scores [padded, keys], results [padded, dim], a sum for each row and for each
    # lane; queries [padded, dim] and weights [padded, keys].
    floats = np.empty(padded * (keys + dim + 1) + BLOCK, np.float32)
    scores, results = floats[: padded * keys], floats[padded * keys : padded * (keys + dim)]
    sums, lanes = floats[padded * (keys + dim) : padded * (keys + dim + 1)], floats[padded * (keys + dim + 1) :]
    words = np.empty(padded * (dim + keys), np.uint16)
    queries, weights = words[: padded * dim], words[padded * dim :]

    for t in range(tokens):
        start = q + 2 * ((first_token + t) * q_stride + head * group * dim)
        source = carray(u16_pointer(start), group * dim, np.uint16)
        target = queries[t * group * dim : (t + 1) * group * dim]
        for i in range(group * dim):
            target[i] = source[i]
    queries[rows * dim :] = np.uint16(0)

    for block in range(blocks):
        page = k_cache + _page(tables, kv_heads, sequence, start_block + block, head) * page_bytes
        # After the last keys come the first values.
        if block + AHEAD < blocks:
            coming = k_cache + _page(tables, kv_heads, sequence, start_block + block + AHEAD, head) * page_bytes
        else:
            first = start_block + block + AHEAD - blocks
            coming = v_cache + _page(tables, kv_heads, sequence, first, head) * page_bytes
        c = scores.ctypes.data + 4 * block * BLOCK
        _score_page(c, keys, queries.ctypes.data, dim, padded, page, coming - page)

    for r in range(rows):
        token = first_token + r // group
        position, end = positions[token], visible[token]
        row, target = scores[r * keys : (r + 1) * keys], weights[r * keys : (r + 1) * keys]
        first = max(0, position - window + 1 - base)
        sums[r] = _softmax_row(row, target, first, end - base, np.float32(scale), lanes)
    weights[rows * keys :] = np.uint16(0)

    results[:] = np.float32(0.0)
    for block in range(blocks):
        page = v_cache + _page(tables, kv_heads, sequence, start_block + block, head) * page_bytes
        # After the last values come the next item's first keys.
        if block + AHEAD < blocks:
            coming = v_cache + _page(tables, kv_heads, sequence, start_block + block + AHEAD, head) * page_bytes
        else:
            first = next_start + block + AHEAD - blocks
            coming = k_cache + _page(tables, kv_heads, next_sequence, first, next_head) * page_bytes
        # Not past the last key: what lies behind it in the block may be another request's leftovers. So the
        # last one of an odd number is paired with itself, and there is no weight for its double.
        depth = min(BLOCK, last + 1 - base - block * BLOCK)
        c, a = results.ctypes.data, weights.ctypes.data + 2 * block * BLOCK
        _add_values(c, a, keys, dim, padded, page, dim, depth // 2, coming - page)
        if depth % 2 == 1:
            # int64 as above: numba would compile it once more for these very numbers.
            none, one = np.int64(0), np.int64(1)
            _add_values(c, a + 2 * (depth - 1), keys, dim, padded, page + 2 * (depth - 1) * dim, none, one, none)

    for t in range(tokens):
        target = carray(
            u16_pointer(out + 2 * ((first_token + t) * out_stride + head * group * dim)),
            group * dim,
            np.uint16,
        )
        source = results[t * group * dim : (t + 1) * group * dim]
        for g in range(group):
            inverse = np.float32(1.0) / sums[t * group + g]
            for d in range(dim):
                target[g * dim + d] = bf16_from_f32(source[g * dim + d] * inverse)


_attend = ATTEND.kernel(attend_item)


def attend(
    q: int, q_stride: int, out: int, out_stride: int, k_cache: int, v_cache: int, kv_heads: int, group: int,
    dim: int, scale: float, window: int, items: np.ndarray, positions: np.ndarray, visible: np.ndarray,
    tables: np.ndarray,
) -> None:  # fmt: skip
    """out[t, h] = softmax(scale * q[t, h] K) V over the keys at positions <= visible[t], in t's sequence.

    `q`, `out`, `k_cache`, `v_cache` are addresses of bfloat16: q and out [T, kv_heads*group, dim] with the
    given strides per token (in elements), k_cache [blocks, kv_heads, dim, 16], v_cache [blocks, kv_heads, 16,
    dim]; dim a multiple of 16. `items` [n, 4] int32: (sequence, first token, tokens, kv head); `positions` and
    `visible` [T] int64; `tables` [S, blocks] int32. With a window w, only the last w positions are seen.
    """
    _attend(
        len(items), q, q_stride, out, out_stride, k_cache, v_cache, kv_heads, group, dim, scale, window, items,
        positions, visible, tables,
    )  # fmt: skip


@WRITE.work
def _write_token(t: int, at: int) -> None:
    k, k_stride, v, v_stride, k_cache, v_cache, kv_heads, dim, slots = _read_write(at)
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


_write = WRITE.kernel(_write_token)


def write_kv(
    k: int, k_stride: int, v: int, v_stride: int, k_cache: int, v_cache: int, kv_heads: int, dim: int,
    slots: np.ndarray,
) -> None:  # fmt: skip
    """Put each token's key and value [kv_heads, dim] (bfloat16, at the given strides per token, in elements)
    at its cache slot (block * 16 + offset), `slots` [T] int64."""
    _write(len(slots), k, k_stride, v, v_stride, k_cache, v_cache, kv_heads, dim, slots)


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
