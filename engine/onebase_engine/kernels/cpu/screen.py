"""The exact best token from approximate logits: screen all with a 4-bit head, score the few left in full.

Invariant: with approx(v) = exact(v) + error(v) and |error(v)| <= margin(v), the best token v* has
approx(v*) + margin(v*) >= max over v of approx(v) - margin(v). So whoever fails that cannot be the best, and
the full product of the others decides. Noise that is known and added to both sides changes nothing of that, so
drawing a token (see `model.noise`) is screened as finding the best one is.
"""

import math
from typing import Any

import numpy as np
import torch
from numba import carray, njit, types

from onebase_engine.kernels.bitsandbytes_import import dequantize_4bit
from onebase_engine.kernels.cpu.noise import add_gumbel, gumbel_all
from onebase_engine.kernels.cpu.packed import PackedLinear, fits_packed
from onebase_engine.kernels.cpu.task import WHOLE, Arguments, array
from onebase_engine.kernels.cpu.vector import f32_from_bf16, larger, u16_pointer
from onebase_engine.kernels.gumbel_noise import Noise
from onebase_engine.kernels.linear4bit import nf4_copy

_DEVIATIONS = 6.0
"""Margin of the screen, in standard deviations of the 4-bit head's error. To lose the best token, the
difference of two errors would have to be 8.5 of its own standard deviations."""


_ROWS = 4096
"""Rows of the head held in float32 at a time while their errors are taken."""


class Screen:
    """A 4-bit copy of a bfloat16 head, and how far each of its rows is off."""

    def __init__(self, head: Any) -> None:
        copy = nf4_copy(head)
        approximate = dequantize_4bit(copy.weight.data, copy.weight.quant_state)
        pairs = zip(head.weight.split(_ROWS), approximate.split(_ROWS), strict=True)
        errors = torch.cat([(exact.float() - rows.float()).norm(dim=1) for exact, rows in pairs])
        # The error of a logit is a sum of `in_features` products: its deviation is |x| |e| / sqrt(in_features).
        self._margins = (_DEVIATIONS / math.sqrt(head.in_features) * errors).numpy()
        self._weight = head.weight
        self._packed = PackedLinear([copy])

    @staticmethod
    def fits(head: Any) -> bool:
        """Whether the head can be screened on this machine."""
        return (
            type(head) is torch.nn.Linear and head.bias is None and fits_packed(head.in_features, head.out_features)
        )

    def best(self, hidden: torch.Tensor, noise: Noise | None = None) -> list[int]:
        """Best token for each row of hidden [n, width], bfloat16."""
        rows, width = hidden.shape
        approx = torch.empty(rows, len(self._margins), dtype=torch.bfloat16)
        self._packed(hidden.data_ptr(), approx.data_ptr(), rows)
        tokens = np.empty(rows, np.int64)
        noise = noise or Noise.of([0.0] * rows, [0] * rows)
        best_tokens(
            hidden.data_ptr(), approx.data_ptr(), self._weight.data_ptr(), self._margins, rows, width,
            noise.inverses, noise.seeds, tokens,
        )  # fmt: skip
        if UNSURE in tokens:
            settle_unsure(
                hidden.float().numpy(), self._weight.data_ptr(), len(self._margins), noise.inverses, noise.seeds,
                tokens,
            )  # fmt: skip
        best: list[int] = tokens.tolist()
        return best


CHUNK = 128
"""Tokens that are ruled out together."""
FEW = 1024
"""Tokens that are scored one by one. Of a row whose model is less sure than that, all are: in order, that is
quicker."""
_PARTS = 64
"""Parts of the vocabulary that threads share then."""
UNSURE = -2
"""In place of such a row's token."""

BEST = Arguments(
    *[WHOLE] * 3, array(types.float32), WHOLE, array(types.float32), array(types.uint64), array(types.int64)
)
"""As `best_tokens` has them, but for the number of rows."""
SCORE = Arguments(
    array(types.float32, 2), WHOLE, array(types.float32), array(types.float32, 2), array(types.float32, 2),
    array(types.int64, 2),
)  # fmt: skip
"""As `_score_all` has them."""
_read_best, _read_score = BEST.read, SCORE.read


# One compiled loop for every pair of rows: the order of the sum is always the same.
@njit(nogil=True, error_model="numpy", fastmath={"reassoc", "contract"})  # type: ignore[untyped-decorator]
def _dot(x: np.ndarray, row: np.ndarray) -> np.float32:
    total = np.float32(0.0)
    for i in range(x.shape[0]):
        total += x[i] * f32_from_bf16(row[i])
    return total


# `noise` may be None, here and in `_best`: numba compiles that case apart, without what it does not need.
@njit(nogil=True, error_model="numpy", fastmath=True)  # type: ignore[untyped-decorator]
def _highest(
    approx: np.ndarray, noise: np.ndarray | None, margins: np.ndarray, first: int, last: int, scale: np.float32,
    inverse: np.float32,
) -> np.float32:  # fmt: skip
    """The largest of approx + scale * margins (widened by approx's own rounding, towards the sign of scale), with
    noise of inverse * that + noise; of the tokens from first to last."""
    highest = np.float32(-3.0e38)
    slack = np.float32(1 / 256) if scale > 0 else np.float32(-1 / 256)
    part, limits = approx[first:last], margins[first:last]
    if noise is not None:
        more = noise[first:last]
    for v in range(part.shape[0]):
        value = f32_from_bf16(part[v])
        value += scale * limits[v] + slack * abs(value)
        if noise is not None:
            value = inverse * value + more[v]
        highest = larger(highest, value)
    return highest


@njit(nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _best(
    x: np.ndarray, norm: np.float32, logits: np.ndarray, weight: int, margins: np.ndarray,
    noise: np.ndarray | None, inverse: np.float32,
) -> np.int64:  # fmt: skip
    """The token of one row, with noise of inverse * logits + noise; -1 if there is none, `UNSURE` if too many are
    left."""
    vocab, width = margins.shape[0], x.shape[0]
    floor = _highest(logits, noise, margins, 0, vocab, -norm, inverse)
    best = np.int64(-1)
    highest = np.float32(-np.inf)
    scored = 0
    for start in range(0, vocab, CHUNK):
        # Nearly all chunks end here, by a vectorised maximum.
        if _highest(logits, noise, margins, start, start + CHUNK, norm, inverse) >= floor:
            for v in range(start, min(start + CHUNK, vocab)):
                if _highest(logits, noise, margins, v, v + 1, norm, inverse) >= floor:
                    scored += 1
                    if scored > FEW:
                        return np.int64(UNSURE)
                    exact = _dot(x, carray(u16_pointer(weight + 2 * v * width), width, np.uint16))
                    if noise is not None:
                        exact = inverse * exact + noise[v]
                    if exact > highest:
                        highest = exact
                        best = np.int64(v)
    return best if np.isfinite(highest) and np.isfinite(norm) else np.int64(-1)


@SCORE.work
def _score_part(part: int, at: int) -> None:
    """The best token, and its score, of each part of the vocabulary: x [rows, width], noise [rows, vocab], highest
    [parts, rows] float32, best [parts, rows] int64."""
    x, weight, inverses, noise, highest, best = _read_score(at)
    rows, width = x.shape
    parts, vocab = best.shape[0], noise.shape[1]
    for v in range(part * vocab // parts, (part + 1) * vocab // parts):
        weights = carray(u16_pointer(weight + 2 * v * width), width, np.uint16)
        for r in range(rows):
            exact = _dot(x[r], weights)
            if inverses[r] != 0:
                exact = inverses[r] * exact + noise[r, v]
            if exact > highest[part, r]:
                highest[part, r] = exact
                best[part, r] = v


_score_all = SCORE.kernel(_score_part)


@BEST.work
def _best_of_row(r: int, at: int) -> None:
    hidden, approx, weight, margins, width, inverses, seeds, tokens = _read_best(at)
    vocab = margins.shape[0]
    source = carray(u16_pointer(hidden + 2 * r * width), width, np.uint16)
    x = np.empty(width, np.float32)
    square = np.float32(0.0)
    for i in range(width):
        x[i] = f32_from_bf16(source[i])
        square += x[i] * x[i]
    norm = np.sqrt(square)
    logits = carray(u16_pointer(approx + 2 * r * vocab), vocab, np.uint16)
    if inverses[r] == 0:
        tokens[r] = _best(x, norm, logits, weight, margins, None, inverses[r])
    else:
        noise = np.zeros(vocab, np.float32)
        gumbel_all(noise, seeds[r])
        tokens[r] = _best(x, norm, logits, weight, margins, noise, inverses[r])


_best_of_rows = BEST.kernel(_best_of_row)


def best_tokens(
    hidden: int, approx: int, weight: int, margins: np.ndarray, rows: int, width: int, inverses: np.ndarray,
    seeds: np.ndarray, tokens: np.ndarray,
) -> None:  # fmt: skip
    """tokens[r] = argmax over v of hidden[r] . weight[v], the lowest v among equals, -1 where it is not finite.

    Addresses of bfloat16: hidden [rows, width], approx [rows, vocab] (each within margins[v] * |hidden[r]| of the
    full product before its own rounding), weight [vocab, width]. margins [vocab] float32, tokens [rows] int64.
    Where inverses[r] (float32) is not 0, the best is of inverses[r] * logits plus the noise of seeds[r] (uint64).
    """
    _best_of_rows(rows, hidden, approx, weight, margins, width, inverses, seeds, tokens)


def settle_unsure(
    hidden: np.ndarray, weight: int, vocab: int, inverses: np.ndarray, seeds: np.ndarray, tokens: np.ndarray
) -> None:
    """Put the best of all tokens in place of each `UNSURE`, of which there is one at least, by the very sums that
    `best_tokens` makes. hidden [rows, width] float32; the rest as there."""
    unsure = np.flatnonzero(tokens == UNSURE)
    noise = np.zeros((len(unsure), vocab), np.float32)
    for place, row in enumerate(unsure):
        if inverses[row]:
            add_gumbel(noise[place], seeds[row])
    highest = np.full((_PARTS, len(unsure)), -np.inf, np.float32)
    best = np.full((_PARTS, len(unsure)), -1, np.int64)
    _score_all(_PARTS, hidden[unsure], weight, inverses[unsure], noise, highest, best)
    parts = highest.argmax(0)
    places = np.arange(len(unsure))
    tokens[unsure] = np.where(np.isfinite(highest[parts, places]), best[parts, places], -1)
