"""Paged attention on GPUs: one kernel for prefill and decode, because both are rows of queries over blocks.

A program takes some query tokens of one sequence with one key-value head; its rows are (token, query head) pairs,
which share every load of keys and values (grouped-query attention). The softmax is the online one of
FlashAttention (Dao et al. 2022, section 3.1), over the pages of PagedAttention (Kwon et al. 2023, section 4.1).

Invariant: a row goes through its keys in steps of `KEYS` positions that begin at multiples of `KEYS`, whatever its
chunk and its neighbours are; a step that shows it nothing leaves its sums as they are, bit for bit. All products
have the same shape in each launch. So chunking, company and prefix reuse change nothing.
"""

import torch
import triton
import triton.language as tl

from onebase_engine.kernels.batch import BLOCK, DeviceArrays
from onebase_engine.kernels.cuda.operand import OPERAND
from onebase_engine.kernels.tiles import QUERY_TOKENS


@triton.jit(do_not_specialize=["blocks"])  # type: ignore[untyped-decorator]
def _attend(
    q: tl.tensor,
    out: tl.tensor,
    k_cache: tl.tensor,
    v_cache: tl.tensor,
    items: tl.tensor,
    positions: tl.tensor,
    visible: tl.tensor,
    tables: tl.tensor,
    q_stride: tl.tensor,
    kv_heads: tl.tensor,
    blocks: tl.tensor,
    scale: tl.tensor,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    BLOCK: tl.constexpr,
    OPERAND: tl.constexpr,
) -> None:
    """Program (item, kv head, which TOKENS of the item's tokens). WIDTH is a power of two from DIM up."""
    item = items + tl.program_id(0) * 3
    head = tl.program_id(1)
    sequence = tl.load(item).to(tl.int64)
    first = tl.program_id(2) * TOKENS
    tokens = tl.minimum(tl.load(item + 2) - first, TOKENS)
    if tokens > 0:
        first += tl.load(item + 1)
        row = tl.arange(0, ROWS)
        inside = row < tokens * GROUP
        token = (first + row // GROUP).to(tl.int64)
        position = tl.load(positions + token, mask=inside, other=0)
        last = tl.load(visible + token, mask=inside, other=-1)
        d = tl.arange(0, WIDTH)
        place = (head * GROUP + row % GROUP)[:, None] * DIM + d[None, :]
        known = inside[:, None] & (d[None, :] < DIM)
        query = tl.load(q + token[:, None] * q_stride + place, mask=known, other=0.0).to(OPERAND)
        highest = tl.full((ROWS,), float("-inf"), tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        sums = tl.zeros((ROWS, WIDTH), tl.float32)
        end = tl.max(last, axis=0) + 1
        start = 0
        if WINDOW > 0:
            start = tl.maximum(tl.load(positions + first) - WINDOW + 1, 0) // KEYS * KEYS
        for step in range(start, end, KEYS):
            at = step + tl.arange(0, KEYS)
            block = tl.load(tables + sequence * blocks + at // BLOCK, mask=at < end, other=0).to(tl.int64)
            page = (block * kv_heads + head) * (DIM * BLOCK)
            offset = at % BLOCK
            # A page's keys lie side by side in each dimension. They are loaded to its end: scores of those that
            # nobody wrote are not seen.
            keys_at = k_cache + page[None, :] + d[:, None] * BLOCK + offset[None, :]
            keys = tl.load(
                tl.max_contiguous(tl.multiple_of(keys_at, (BLOCK, BLOCK)), (1, BLOCK)),
                mask=(at // BLOCK * BLOCK < end)[None, :] & (d[:, None] < DIM),
                other=0.0,
            )
            scores = tl.dot(query, keys.to(OPERAND), input_precision="ieee") * scale
            if SOFTCAP > 0:
                # SOFTCAP * tanh(scores / SOFTCAP)
                scores = SOFTCAP - 2 * SOFTCAP / (1 + tl.exp(scores * (2 / SOFTCAP)))
            seen = at[None, :] <= last[:, None]
            if WINDOW > 0:
                seen = seen & (at[None, :] > position[:, None] - WINDOW)
            scores = tl.where(seen, scores, float("-inf"))
            raised = tl.maximum(highest, tl.max(scores, axis=1))
            level = tl.where(raised == float("-inf"), 0.0, raised)
            weights = tl.exp(scores - level[:, None])
            faded = tl.exp(highest - level)
            highest = raised
            total = total * faded + tl.sum(weights, axis=1)
            # What was not written may be no number, which a weight of nothing does not undo.
            values = tl.load(
                v_cache + page[:, None] + offset[:, None] * DIM + d[None, :],
                mask=(at < end)[:, None] & (d[None, :] < DIM),
                other=0.0,
            )
            sums = tl.dot(weights.to(OPERAND), values.to(OPERAND), sums * faded[:, None], input_precision="ieee")
        total = tl.where(inside, total, 1.0)
        result = (sums / total[:, None]).to(out.dtype.element_ty)
        tl.store(out + token[:, None] * (kv_heads * GROUP * DIM) + place, result, mask=known)


def attend(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    batch: DeviceArrays,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """As `reference.attend`."""
    heads, dim = q.shape[1:]
    kv_heads = k_cache.shape[1]
    group = heads // kv_heads
    # Not under 64: narrower values are swizzled otherwise than keys are, and ptxas 12.8 (triton 3.6 and 3.7) then
    # takes the values' place in shared memory from a register that holds something else.
    width = max(64, triton.next_power_of_2(dim))
    # The largest square of scores that leaves the registers enough for the sums, on every GPU since Ampere.
    side = 64 if width <= 128 else 32
    tokens = max(1, min(QUERY_TOKENS, side // group))
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    grid = (len(batch.items), kv_heads, triton.cdiv(min(batch.most_tokens, QUERY_TOKENS), tokens))
    _attend[grid](
        q, out, k_cache, v_cache, batch.items, batch.positions, batch.visible, batch.tables, q.stride(0), kv_heads,
        batch.tables.shape[1], scale, WINDOW=window or 0, SOFTCAP=softcap or 0.0, GROUP=group, DIM=dim,
        WIDTH=width, TOKENS=tokens, ROWS=max(16, triton.next_power_of_2(tokens * group)), KEYS=side, BLOCK=BLOCK,
        OPERAND=OPERAND, num_warps=4, num_stages=3,
    )  # fmt: skip
    return out


@triton.jit  # type: ignore[untyped-decorator]
def _write_kv(
    k: tl.tensor,
    v: tl.tensor,
    k_cache: tl.tensor,
    v_cache: tl.tensor,
    cache_slots: tl.tensor,
    k_stride: tl.tensor,
    v_stride: tl.tensor,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Program (token). SIZE is kv_heads * DIM, WIDTH the same rounded up to a power of two."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(cache_slots + token).to(tl.int64)
    page, offset = slot // BLOCK * (SIZE * BLOCK), slot % BLOCK
    e = tl.arange(0, WIDTH)
    inside = e < SIZE
    key = tl.load(k + token * k_stride + e, mask=inside)
    value = tl.load(v + token * v_stride + e, mask=inside)
    tl.store(k_cache + page + e * BLOCK + offset, key, mask=inside)
    tl.store(v_cache + page + (e // DIM * BLOCK + offset) * DIM + e % DIM, value, mask=inside)


def write_kv(
    k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, batch: DeviceArrays
) -> None:
    """As `reference.write_kv`."""
    kv_heads, dim = k_cache.shape[1:3]
    size = kv_heads * dim
    _write_kv[(len(k),)](
        k, v, k_cache, v_cache, batch.cache_slots, k.stride(0), v.stride(0), SIZE=size,
        WIDTH=triton.next_power_of_2(size), DIM=dim, BLOCK=BLOCK,
    )  # fmt: skip
