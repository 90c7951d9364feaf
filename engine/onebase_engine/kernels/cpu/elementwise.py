"""The small operations between a decoder layer's matrix products, each fused into one pass over memory.

They round to bfloat16 wherever transformers' eager modules do, so a fused layer gives the eager layer's numbers.
Rows are independent; few rows run on the calling thread, because waking the others would cost more.
"""

import math

import numpy as np
from numba import carray, njit, types

from onebase_engine.kernels.batch import BLOCK
from onebase_engine.kernels.cpu.attention import attend, exp_nonpositive
from onebase_engine.kernels.cpu.block_sums import sum_row_blocks
from onebase_engine.kernels.cpu.task import FLAG, NUMBER, WHOLE, Arguments, array
from onebase_engine.kernels.cpu.vector import bf16_from_f32, f32_from_bf16, f32_pointer, u16_pointer

SERIAL_ROWS = 4
"""Up to so many rows are not worth a parallel region (about 3 microseconds)."""
_TWO_ROOTS = np.float32(2 * math.sqrt(2 / math.pi))
_CUBE = np.float32(0.044715)

NORM = Arguments(*[WHOLE] * 4, FLAG, WHOLE, WHOLE, NUMBER, WHOLE, WHOLE)
"""As `add_rms_norm` has them, but for the number of rows; then the block and the address of `sum_blocks`, or 0."""
GATE = Arguments(WHOLE, FLAG, *[WHOLE] * 4)
"""As `gate_mul` has them, but for the number of rows; then as in `NORM`."""
ROPE = Arguments(*[WHOLE] * 3, FLAG, NUMBER, *[WHOLE] * 8, FLAG, array(types.int64), array(types.int64))
"""As `rope_attend` has them, without what is the attention's."""
AFFINE = Arguments(WHOLE, WHOLE, array(types.int32), array(types.int64), array(types.int64))
"""As `affine_rows` has them."""
_read_norm, _read_gate, _read_rope, _read_affine = NORM.read, GATE.read, ROPE.read, AFFINE.read


@njit(nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _round(x: np.float32) -> np.float32:
    rounded: np.float32 = f32_from_bf16(bf16_from_f32(x))
    return rounded


# The same compiled loop for every row, so the order of its sum, whatever LLVM makes it, is always the same.
@njit(nogil=True, error_model="numpy", fastmath={"reassoc", "contract"})  # type: ignore[untyped-decorator]
def _mean_square(row: np.ndarray) -> np.float32:
    total = np.float32(0.0)
    for i in range(row.shape[0]):
        value = f32_from_bf16(row[i])
        total += value * value
    return total / np.float32(row.shape[0])


@njit(nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _norm(x: int, weight: int, unit_offset: bool, out: int, width: int, eps: float) -> None:
    row = carray(u16_pointer(x), width, np.uint16)
    scale = np.float32(1.0) / np.sqrt(_mean_square(row) + np.float32(eps))
    weights = carray(u16_pointer(weight), width, np.uint16)
    target = carray(u16_pointer(out), width, np.uint16)
    if unit_offset:
        for i in range(width):
            target[i] = bf16_from_f32(f32_from_bf16(row[i]) * scale * (np.float32(1.0) + f32_from_bf16(weights[i])))
    else:
        for i in range(width):
            normed = _round(f32_from_bf16(row[i]) * scale)
            target[i] = bf16_from_f32(normed * f32_from_bf16(weights[i]))


@NORM.work
def norm_row(t: int, at: int) -> None:
    """Row t of `add_rms_norm`."""
    x, delta, behind, weight, unit_offset, out, width, eps, block, sums = _read_norm(at)
    step = 2 * t * width
    if delta != 0:
        if behind != 0:
            _norm(delta + step, behind, unit_offset, delta + step, width, eps)
        row = carray(u16_pointer(x + step), width, np.uint16)
        change = carray(u16_pointer(delta + step), width, np.uint16)
        for i in range(width):
            row[i] = bf16_from_f32(f32_from_bf16(row[i]) + f32_from_bf16(change[i]))
    _norm(x + step, weight, unit_offset, out + step, width, eps)
    sum_row_blocks(t, out, width, block, sums)


_norm_rows = NORM.kernel(norm_row, serial=SERIAL_ROWS)


def add_rms_norm(
    x: int, delta: int, behind: int, weight: int, unit_offset: bool, out: int, rows: int, width: int, eps: float
) -> None:
    """x += delta (unless `delta` is 0), then out = RMSNorm(x) * weight; addresses of bfloat16 [rows, width].

    Before it is added, delta is normalised itself, in place, by the weight `behind` (unless that is 0). Weights are
    rounded as in Llama, or with `unit_offset` are stored as what exceeds 1 and multiply in float32.
    """
    _norm_rows(rows, x, delta, behind, weight, unit_offset, out, width, eps, 0, 0)


@GATE.work
def gate_row(t: int, at: int) -> None:
    """Row t of `gate_mul`."""
    gate_up, gelu, out, width, block, sums = _read_gate(at)
    step = 2 * t * width
    gate = carray(u16_pointer(gate_up + 2 * step), width, np.uint16)
    up = carray(u16_pointer(gate_up + 2 * step + 2 * width), width, np.uint16)
    target = carray(u16_pointer(out + step), width, np.uint16)
    for i in range(width):
        value = f32_from_bf16(gate[i])
        # gelu's (1 + tanh(z)) / 2 is the sigmoid of 2 z.
        inner = _TWO_ROOTS * (value + _CUBE * value * value * value) if gelu else value
        small = exp_nonpositive(-abs(inner))
        sigmoid = (np.float32(1.0) if inner >= 0 else small) / (np.float32(1.0) + small)
        target[i] = bf16_from_f32(_round(value * sigmoid) * f32_from_bf16(up[i]))
    sum_row_blocks(t, out, width, block, sums)


_gate_rows = GATE.kernel(gate_row, serial=SERIAL_ROWS)


def gate_mul(gate_up: int, gelu: bool, out: int, rows: int, width: int) -> None:
    """out = silu(gate) * up, or gelu by tanh in place of silu; addresses of bfloat16, gate_up [rows, 2 * width]
    (gate first), out [rows, width]."""
    _gate_rows(rows, gate_up, gelu, out, width, 0, 0)


@njit(nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _turn(head: np.ndarray, i: int, j: int, cos: np.float32, sin: np.float32) -> None:
    first, second = f32_from_bf16(head[i]), f32_from_bf16(head[j])
    head[i] = bf16_from_f32(_round(first * cos) + _round(-second * sin))
    head[j] = bf16_from_f32(_round(second * cos) + _round(first * sin))


@njit(nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _rotate(head: np.ndarray, cos: np.ndarray, sin: np.ndarray, turned: int, neighbours: bool) -> None:
    """Rotary embedding of a head's first `turned` numbers in place, of `neighbours` as pairs (Su et al. 2021) or of
    halves apart (transformers' rotate_half)."""
    half = turned // 2
    if neighbours:
        for i in range(half):
            _turn(head, 2 * i, 2 * i + 1, f32_from_bf16(cos[i]), f32_from_bf16(sin[i]))
    else:
        for i in range(half):
            _turn(head, i, half + i, f32_from_bf16(cos[i]), f32_from_bf16(sin[i]))


@ROPE.work
def rope_row(t: int, at: int) -> None:
    """Row t of `rope_attend`, but for the attention."""
    (
        qkv, q_norm, k_norm, unit_offset, eps, cos, sin, k_cache, v_cache, heads, kv_heads, dim, turned, neighbours,
        slots, positions,
    ) = _read_rope(at)  # fmt: skip
    row, angle, slot = qkv + 2 * t * (heads + 2 * kv_heads) * dim, 2 * positions[t] * turned, slots[t]
    cosine = carray(u16_pointer(cos + angle), turned, np.uint16)
    sine = carray(u16_pointer(sin + angle), turned, np.uint16)
    for h in range(heads + kv_heads):
        head, weight = row + 2 * h * dim, q_norm if h < heads else k_norm
        if weight != 0:
            _norm(head, weight, unit_offset, head, dim, eps)
        _rotate(carray(u16_pointer(head), dim, np.uint16), cosine, sine, turned, neighbours)
    block, offset = slot // BLOCK, slot % BLOCK
    page = 2 * block * kv_heads * dim * BLOCK
    key = carray(u16_pointer(row + 2 * heads * dim), kv_heads * dim, np.uint16)
    value = carray(u16_pointer(row + 2 * (heads + kv_heads) * dim), kv_heads * dim, np.uint16)
    key_page = carray(u16_pointer(k_cache + page), kv_heads * dim * BLOCK, np.uint16)
    value_page = carray(u16_pointer(v_cache + page), kv_heads * dim * BLOCK, np.uint16)
    for h in range(kv_heads):
        for d in range(dim):
            key_page[(h * dim + d) * BLOCK + offset] = key[h * dim + d]
            value_page[(h * BLOCK + offset) * dim + d] = value[h * dim + d]


_rope_rows = ROPE.kernel(rope_row, serial=SERIAL_ROWS)


def rope_attend(
    qkv: int, q_norm: int, k_norm: int, unit_offset: bool, eps: float, cos: int, sin: int, out: int, k_cache: int,
    v_cache: int, heads: int, kv_heads: int, dim: int, turned: int, neighbours: bool, scale: float, window: int,
    slots: np.ndarray, items: np.ndarray, positions: np.ndarray, visible: np.ndarray, tables: np.ndarray,
) -> None:  # fmt: skip
    """Normalise queries and keys of qkv [T, (heads + 2 * kv_heads) * dim] by head (unless `q_norm` and `k_norm`,
    [dim], are 0) and rotate the first `turned` numbers of each, in place, write keys and values to the cache, then
    attend into out [T, heads * dim]; cos and sin [positions, turned], the second half of each as the first.
    Addresses of bfloat16; see `attend`."""
    _rope_rows(
        len(slots), qkv, q_norm, k_norm, unit_offset, eps, cos, sin, k_cache, v_cache, heads, kv_heads, dim, turned,
        neighbours, slots, positions,
    )  # fmt: skip
    attend(
        qkv, (heads + 2 * kv_heads) * dim, out, heads * dim, k_cache, v_cache, kv_heads, heads // kv_heads, dim,
        scale, window, items, positions, visible, tables,
    )  # fmt: skip


@AFFINE.work
def _affine_row(t: int, at: int) -> None:
    y, width, slots, scales, shifts = _read_affine(at)
    scale, shift = scales[slots[t]], shifts[slots[t]]
    row = carray(u16_pointer(y + 2 * t * width), width, np.uint16)
    if scale != 0:
        factors = carray(f32_pointer(scale), width, np.float32)
        for i in range(width):
            row[i] = bf16_from_f32(f32_from_bf16(row[i]) * factors[i])
    if shift != 0:
        terms = carray(f32_pointer(shift), width, np.float32)
        for i in range(width):
            row[i] = bf16_from_f32(f32_from_bf16(row[i]) + terms[i])


_affine_rows = AFFINE.kernel(_affine_row)


def affine_rows(y: int, width: int, slots: np.ndarray, scales: np.ndarray, shifts: np.ndarray) -> None:
    """y[t] = y[t] * scale + shift by row t's slot, in place; y the address of bfloat16 [rows, width].

    `scales` and `shifts` [slots] int64: addresses of float32 [width], 0 for none.
    """
    _affine_rows(len(slots), y, width, slots, scales, shifts)
