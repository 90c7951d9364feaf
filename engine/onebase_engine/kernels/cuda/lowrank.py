"""Low-rank updates for a batch in which every token may have another adapter: y += scale * B (A x), by slot.

The idea is SGMV's and BGMV's (Punica, Chen et al. 2023, section 4; S-LoRA, Sheng et al. 2023, section 5): rows of
one slot share a tile and so one load of its weights, and a slot's matrices are found through its addresses and its
own ranks, so nothing is padded to the largest. Decode is tiles with one row, prefill tiles with sixteen.

Two launches: `_shrink` computes A x in spans of the input, `_expand` adds the spans up and multiplies by B. With
biases, and an activation between the two, the same is a bottleneck.

Invariant: a row's sums do not depend on the other rows. The shape of every product is the same in each launch, the
spans are cut by the site's width alone and added up in order, and nothing is accumulated with atomics.
"""

import math

import numpy as np
import torch
import triton
import triton.language as tl

from onebase_engine.kernels.cuda.operand import OPERAND
from onebase_engine.kernels.tables import BottleneckTable, LowRankTable

TILE = 16
"""Rows in a tile, at most: what a tensor core takes at least."""
_SPAN = 1024
"""Input columns that one program of `_shrink` sums over: enough programs for a whole GPU with a single tile."""
_DEPTH = 512
"""Input columns in one product."""
_RANKS = 16
"""Ranks in one product."""
_COLUMNS = 256
"""Output columns of one program of `_expand`."""


@triton.jit(do_not_specialize=["rows", "width"])  # type: ignore[untyped-decorator]
def _shrink(
    x: tl.tensor,
    hidden: tl.tensor,
    tiles: tl.tensor,
    weights: tl.tensor,
    in_features: tl.tensor,
    rows: tl.tensor,
    width: tl.tensor,
    SITES: tl.constexpr,
    FIELDS: tl.constexpr,
    TILE: tl.constexpr,
    SPAN: tl.constexpr,
    DEPTH: tl.constexpr,
    RANKS: tl.constexpr,
    OPERAND: tl.constexpr,
) -> None:
    """hidden[span, t, r] = A[r, span] x[t, span] for the rows t of a tile: program (tile, block of ranks, span).

    `weights` [slots, FIELDS] as `LowRankTable.rows_on` has them.
    """
    tile = tl.program_id(0)
    slot = tl.load(tiles + tile * (1 + TILE)).to(tl.int64)
    entry = weights + slot * FIELDS
    total = tl.load(entry + 1 + SITES)
    for site in tl.static_range(1, SITES):
        total += tl.load(entry + 1 + SITES + site)
    first = tl.program_id(1) * RANKS
    if first < total:
        a = tl.load(entry).to(tl.pointer_type(tl.bfloat16))
        a = tl.multiple_of(a, 16)
        row = tl.load(tiles + tile * (1 + TILE) + 1 + tl.arange(0, TILE)).to(tl.int64)
        rank = first + tl.arange(0, RANKS)
        start = tl.program_id(2) * SPAN
        sums = tl.zeros((TILE, RANKS), tl.float32)
        for depth in range(0, SPAN, DEPTH):
            k = start + depth + tl.arange(0, DEPTH)
            inputs = tl.load(
                x + row[:, None] * in_features + k[None, :],
                mask=(row[:, None] >= 0) & (k[None, :] < in_features),
                other=0.0,
            )
            matrix = tl.load(
                a + rank[None, :].to(tl.int64) * in_features + k[:, None],
                mask=(rank[None, :] < total) & (k[:, None] < in_features),
                other=0.0,
            )
            sums = tl.dot(inputs.to(OPERAND), matrix.to(OPERAND), sums, input_precision="ieee")
        target = hidden + (tl.program_id(2) * rows + row[:, None]) * width + rank[None, :]
        tl.store(target, sums, mask=(row[:, None] >= 0) & (rank[None, :] < total))


@triton.jit  # type: ignore[untyped-decorator]
def _activate(x: tl.tensor, code: tl.tensor) -> tl.tensor:
    """`code` is the activation's place in `ACTIVATIONS`."""
    result = x
    if code == 1:
        result = tl.maximum(x, 0.0)
    elif code == 2:
        result = 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    elif code == 3:  # x (1 + tanh(u)) / 2 is x / (1 + exp(-2 u))
        result = x / (1 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
    elif code == 4:
        result = x / (1 + tl.exp(-x))
    elif code == 5:
        result = 2 / (1 + tl.exp(-2 * x)) - 1
    return result


@triton.jit(do_not_specialize=["rows", "width"])  # type: ignore[untyped-decorator]
def _expand(
    hidden: tl.tensor,
    y: tl.tensor,
    tiles: tl.tensor,
    weights: tl.tensor,
    rows: tl.tensor,
    width: tl.tensor,
    y_stride: tl.tensor,
    SPANS: tl.constexpr,
    SITES: tl.constexpr,
    FIELDS: tl.constexpr,
    ACTIVATED: tl.constexpr,
    ALIGNED: tl.constexpr,
    TILE: tl.constexpr,
    RANKS: tl.constexpr,
    COLUMNS: tl.constexpr,
    OPERAND: tl.constexpr,
) -> None:
    """y[t, columns] += scale * B (sum of the spans of hidden[t]): program (tile, site, block of its columns).

    `ALIGNED`: a number that divides all of the sites' columns. `ACTIVATED`: `weights` go on with biases and an
    activation, as `BottleneckTable.rows_on_device` has them.
    """
    tile, site = tl.program_id(0), tl.program_id(1)
    slot = tl.load(tiles + tile * (1 + TILE)).to(tl.int64)
    entry = weights + slot * FIELDS
    rank = tl.load(entry + 1 + SITES + site).to(tl.int32)
    site_column = tl.multiple_of(tl.load(entry + 1 + 3 * SITES + site), ALIGNED)
    out_features = tl.multiple_of(tl.load(entry + 2 + 3 * SITES + site) - site_column, ALIGNED)
    if (rank > 0) & (tl.program_id(2) * COLUMNS < out_features):
        # The site's ranks come after those of the sites before it.
        first = 0
        for before in range(site):
            first += tl.load(entry + 1 + SITES + before).to(tl.int32)
        b = tl.load(entry + 1 + site).to(tl.pointer_type(tl.bfloat16))
        b = tl.multiple_of(b, 16)
        scale = tl.load(entry + 1 + 2 * SITES + site).to(tl.int32).to(tl.float32, bitcast=True)
        row = tl.load(tiles + tile * (1 + TILE) + 1 + tl.arange(0, TILE)).to(tl.int64)
        column = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
        sums = tl.zeros((TILE, COLUMNS), tl.float32)
        for start in range(0, rank, RANKS):
            r = start + tl.arange(0, RANKS)
            known = (row[:, None] >= 0) & (r[None, :] < rank)
            source = hidden + row[:, None] * width + first + r[None, :]
            inner = tl.load(source, mask=known, other=0.0)
            for _ in tl.static_range(1, SPANS):
                source += rows * width
                inner += tl.load(source, mask=known, other=0.0)
            if ACTIVATED:
                bias = tl.load(entry + 2 + 4 * SITES).to(tl.pointer_type(tl.float32))
                inner += tl.load(bias + r, mask=r < rank, other=0.0)[None, :]
                inner = _activate(inner, tl.load(entry + 4 + 4 * SITES))
            matrix = tl.load(
                b + r[:, None] * out_features + column[None, :],
                mask=(r[:, None] < rank) & (column[None, :] < out_features),
                other=0.0,
            )
            sums = tl.dot(inner.to(OPERAND), matrix.to(OPERAND), sums, input_precision="ieee")
        if ACTIVATED:
            bias = tl.load(entry + 3 + 4 * SITES).to(tl.pointer_type(tl.float32))
            sums += tl.load(bias + column, mask=column < out_features, other=0.0)[None, :]
        target = y + row[:, None] * y_stride + site_column + column[None, :]
        inside = (row[:, None] >= 0) & (column[None, :] < out_features)
        base = tl.load(target, mask=inside, other=0.0).to(tl.float32)
        tl.store(target, (base + scale * sums).to(y.dtype.element_ty), mask=inside)


def add_low_rank(x: torch.Tensor, y: torch.Tensor, tiles: torch.Tensor, table: LowRankTable) -> None:
    """As `reference.add_low_rank`; `tiles` [n, 1 + TILE] int32 on the device of x and y."""
    _update(x, y, tiles, table.rows_on(x.device), table.columns, table.widest, activated=False)


def add_bottleneck(
    x: torch.Tensor, y: torch.Tensor, tiles: torch.Tensor, table: BottleneckTable, *, parallel: bool
) -> None:
    """As `reference.add_bottleneck`; `tiles` [n, 1 + TILE] int32 on the device of x and y."""
    columns, widest = np.array([0, y.shape[1]]), int(table.ranks.max())
    weights = table.rows_on_device(parallel=parallel)
    _update(x if parallel else y, y, tiles, weights, columns, widest, activated=True)


def _update(
    x: torch.Tensor,
    y: torch.Tensor,
    tiles: torch.Tensor,
    weights: torch.Tensor,
    columns: np.ndarray,
    width: int,
    *,
    activated: bool,
) -> None:
    rows, in_features = x.shape
    sites, fields = len(columns) - 1, weights.shape[1]
    spans = triton.cdiv(in_features, _SPAN)
    hidden = torch.empty(spans * rows * width, dtype=torch.float32, device=x.device)
    _shrink[len(tiles), triton.cdiv(width, _RANKS), spans](
        x, hidden, tiles, weights, in_features, rows, width, SITES=sites, FIELDS=fields, TILE=TILE, SPAN=_SPAN,
        DEPTH=_DEPTH, RANKS=_RANKS, OPERAND=OPERAND,
    )  # fmt: skip
    widest_site = int(np.diff(columns).max())
    _expand[len(tiles), sites, triton.cdiv(widest_site, _COLUMNS)](
        hidden, y, tiles, weights, rows, width, y.shape[1], SPANS=spans, SITES=sites, FIELDS=fields,
        ACTIVATED=activated, ALIGNED=math.gcd(16, *columns.tolist()), TILE=TILE, RANKS=_RANKS, COLUMNS=_COLUMNS,
        OPERAND=OPERAND,
    )  # fmt: skip
