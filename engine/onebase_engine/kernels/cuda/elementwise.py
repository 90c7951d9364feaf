"""Small operations on rows: vectors by slot, and what stands between a decoder layer's products, each in one pass.

The latter round to bfloat16 wherever transformers' modules do, so that a fused layer gives their numbers.
"""

import torch
import triton
import triton.language as tl

from onebase_engine.kernels.batch import BLOCK, DeviceArrays
from onebase_engine.kernels.tables import Vectors

_COLUMNS = 1024


@triton.jit  # type: ignore[untyped-decorator]
def _affine_rows(
    y: tl.tensor,
    slots: tl.tensor,
    scales: tl.tensor,
    shifts: tl.tensor,
    width: tl.tensor,
    COLUMNS: tl.constexpr,
) -> None:
    """Program (row, block of columns). `scales` and `shifts` [slots]: addresses of float32 [width], or 0."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row)
    scale, shift = tl.load(scales + slot), tl.load(shifts + slot)
    if (scale != 0) | (shift != 0):
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        inside = column < width
        target = y + row * width + column
        values = tl.load(target, mask=inside, other=0.0)
        if scale != 0:
            factors = tl.load(scale.to(tl.pointer_type(tl.float32)) + column, mask=inside, other=0.0)
            values = (values.to(tl.float32) * factors).to(y.dtype.element_ty)
        if shift != 0:
            terms = tl.load(shift.to(tl.pointer_type(tl.float32)) + column, mask=inside, other=0.0)
            values = (values.to(tl.float32) + terms).to(y.dtype.element_ty)
        tl.store(target, values, mask=inside)


def affine_rows(y: torch.Tensor, slots: torch.Tensor, scales: Vectors, shifts: Vectors) -> None:
    """As `reference.affine_rows`; `slots` [rows] int32 on the device of y."""
    rows, width = y.shape
    _affine_rows[rows, triton.cdiv(width, _COLUMNS)](
        y, slots, scales.addresses_on_device(), shifts.addresses_on_device(), width, COLUMNS=_COLUMNS
    )


@triton.jit  # type: ignore[untyped-decorator]
def _normed(
    values: tl.tensor, weight: tl.tensor, width: tl.tensor, eps: tl.tensor, UNIT_OFFSET: tl.constexpr
) -> tl.tensor:
    """values [n] float32, zero behind `width`, as transformers' RMS norms make of them, in bfloat16."""
    scale = tl.rsqrt(tl.sum(values * values, axis=0) / width + eps)
    if UNIT_OFFSET:
        return (values * scale * (1 + weight)).to(tl.bfloat16)
    return ((values * scale).to(tl.bfloat16).to(tl.float32) * weight).to(tl.bfloat16)


@triton.jit  # type: ignore[untyped-decorator]
def _add_rms_norm(
    x: tl.tensor,
    change: tl.tensor,
    behind: tl.tensor,
    weight: tl.tensor,
    out: tl.tensor,
    width: tl.tensor,
    eps: tl.tensor,
    CHANGED: tl.constexpr,
    BEHIND: tl.constexpr,
    UNIT_OFFSET: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Program (row). COLUMNS is `width` rounded up to a power of two."""
    start = tl.program_id(0).to(tl.int64) * width
    column = tl.arange(0, COLUMNS)
    inside = column < width
    values = tl.load(x + start + column, mask=inside, other=0.0).to(tl.float32)
    if CHANGED:
        more = tl.load(change + start + column, mask=inside, other=0.0).to(tl.float32)
        if BEHIND:
            factors = tl.load(behind + column, mask=inside, other=0.0).to(tl.float32)
            more = _normed(more, factors, width, eps, UNIT_OFFSET).to(tl.float32)
        summed = (values + more).to(tl.bfloat16)
        tl.store(x + start + column, summed, mask=inside)
        values = summed.to(tl.float32)
    factors = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + start + column, _normed(values, factors, width, eps, UNIT_OFFSET), mask=inside)


def add_rms_norm(
    x: torch.Tensor,
    change: torch.Tensor | None,
    behind: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    *,
    unit_offset: bool,
) -> torch.Tensor:
    """Add `change` [rows, width], through the norm `behind` if there is one, to x in place; returns x's norm."""
    rows, width = x.shape
    out = torch.empty_like(x)
    columns = triton.next_power_of_2(width)
    _add_rms_norm[(rows,)](
        x, x if change is None else change, weight if behind is None else behind, weight, out, width, eps,
        CHANGED=change is not None, BEHIND=behind is not None, UNIT_OFFSET=unit_offset, COLUMNS=columns,
        num_warps=max(1, min(8, columns // 512)),
    )  # fmt: skip
    return out


@triton.jit  # type: ignore[untyped-decorator]
def _rope_write(
    qkv: tl.tensor,
    q_norm: tl.tensor,
    k_norm: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    k_cache: tl.tensor,
    v_cache: tl.tensor,
    positions: tl.tensor,
    cache_slots: tl.tensor,
    eps: tl.tensor,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    NORMS: tl.constexpr,
    UNIT_OFFSET: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Program (token, head of queries, then of keys, then of values). HALF is DIM / 2 rounded up to a power of two.

    Queries are turned in place, keys on their way into the cache."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    source = qkv + token * ((HEADS + 2 * KV_HEADS) * DIM) + head * DIM
    d = tl.arange(0, HALF)
    inside = d < DIM // 2
    first = tl.load(source + d, mask=inside, other=0.0)
    second = tl.load(source + DIM // 2 + d, mask=inside, other=0.0)
    slot = tl.load(cache_slots + token).to(tl.int64)
    page, offset = slot // BLOCK * (KV_HEADS * BLOCK * DIM), slot % BLOCK
    if head >= HEADS + KV_HEADS:
        target = v_cache + page + ((head - HEADS - KV_HEADS) * BLOCK + offset) * DIM + d
        tl.store(target, first, mask=inside)
        tl.store(target + DIM // 2, second, mask=inside)
    else:
        if NORMS:
            weight = q_norm
            if head >= HEADS:
                weight = k_norm
            a, b = first.to(tl.float32), second.to(tl.float32)
            scale = tl.rsqrt((tl.sum(a * a, axis=0) + tl.sum(b * b, axis=0)) / DIM + eps)
            u = tl.load(weight + d, mask=inside, other=0.0).to(tl.float32)
            v = tl.load(weight + DIM // 2 + d, mask=inside, other=0.0).to(tl.float32)
            if UNIT_OFFSET:
                first, second = (a * scale * (1 + u)).to(tl.bfloat16), (b * scale * (1 + v)).to(tl.bfloat16)
            else:
                first = ((a * scale).to(tl.bfloat16).to(tl.float32) * u).to(tl.bfloat16)
                second = ((b * scale).to(tl.bfloat16).to(tl.float32) * v).to(tl.bfloat16)
        angle = tl.load(positions + token).to(tl.int64) * DIM + d
        # Each product and each sum rounded, as transformers' are.
        a, b = first.to(tl.float32), second.to(tl.float32)
        along = (a * tl.load(cos + angle, mask=inside, other=0.0).to(tl.float32)).to(tl.bfloat16).to(tl.float32)
        across = (b * tl.load(sin + angle, mask=inside, other=0.0).to(tl.float32)).to(tl.bfloat16).to(tl.float32)
        first = (along - across).to(tl.bfloat16)
        angle += DIM // 2
        along = (b * tl.load(cos + angle, mask=inside, other=0.0).to(tl.float32)).to(tl.bfloat16).to(tl.float32)
        across = (a * tl.load(sin + angle, mask=inside, other=0.0).to(tl.float32)).to(tl.bfloat16).to(tl.float32)
        second = (along + across).to(tl.bfloat16)
        if head < HEADS:
            tl.store(source + d, first, mask=inside)
            tl.store(source + DIM // 2 + d, second, mask=inside)
        else:
            target = k_cache + page + ((head - HEADS) * DIM + d) * BLOCK + offset
            tl.store(target, first, mask=inside)
            tl.store(target + DIM // 2 * BLOCK, second, mask=inside)


def rope_write(
    qkv: torch.Tensor,
    norms: tuple[torch.Tensor, torch.Tensor] | None,
    angles: tuple[torch.Tensor, torch.Tensor],
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    batch: DeviceArrays,
    eps: float,
    *,
    unit_offset: bool,
) -> torch.Tensor:
    """Turn a layer's queries and keys, `norms` of their heads before, by their positions' `angles` (cosines and
    sines [positions, dim]), and write keys and values into the cache; returns the queries [T, heads, dim], a view
    of qkv [T, (heads + 2 * kv_heads) * dim]."""
    kv_heads, dim = k_cache.shape[1:3]
    heads = qkv.shape[1] // dim - 2 * kv_heads
    _rope_write[len(qkv), heads + 2 * kv_heads](
        qkv, *(norms or (qkv, qkv)), *angles, k_cache, v_cache, batch.positions, batch.cache_slots, eps,
        HEADS=heads, KV_HEADS=kv_heads, DIM=dim, HALF=triton.next_power_of_2(dim // 2), NORMS=norms is not None,
        UNIT_OFFSET=unit_offset, BLOCK=BLOCK, num_warps=1,
    )  # fmt: skip
    return qkv[:, : heads * dim].view(len(qkv), heads, dim)


@triton.jit  # type: ignore[untyped-decorator]
def _gate_mul(
    gate_up: tl.tensor, out: tl.tensor, width: tl.tensor, GELU: tl.constexpr, COLUMNS: tl.constexpr
) -> None:
    """Program (row, block of columns)."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < width
    gate = tl.load(gate_up + row * 2 * width + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * width + width + column, mask=inside, other=0.0).to(tl.float32)
    if GELU:  # by tanh: x (1 + tanh(u)) / 2 is x / (1 + exp(-2 u))
        active = gate / (1 + tl.exp(-1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)))
    else:
        active = gate / (1 + tl.exp(-gate))
    tl.store(out + row * width + column, (active.to(tl.bfloat16).to(tl.float32) * up).to(tl.bfloat16), mask=inside)


def gate_mul(gate_up: torch.Tensor, *, gelu: bool) -> torch.Tensor:
    """[rows, width] of [rows, 2 * width]: the first half's activation (silu, or gelu) times the second half."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(rows, width, dtype=gate_up.dtype, device=gate_up.device)
    _gate_mul[rows, triton.cdiv(width, _COLUMNS)](gate_up, out, width, GELU=gelu, COLUMNS=_COLUMNS)
    return out
