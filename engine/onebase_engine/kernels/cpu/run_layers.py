"""All layers of a decoder in one parallel region. A region of its own for each kernel costs microseconds, and its
end waits for every thread; two to three hundred a step cost more than the arithmetic that two cores share, and
several times that as soon as another program wants a core. Here threads share the tasks of one stage after another.

The kernels are the same, in the same order, as in `model.fused`: that is where to read what a layer does.
"""

import numpy as np
from numba import carray, njit, types

from onebase_engine.kernels.cpu.attention import ATTEND, attend_item
from onebase_engine.kernels.cpu.block_sums import SUM, sum_row
from onebase_engine.kernels.cpu.elementwise import GATE, NORM, ROPE, gate_row, norm_row, rope_row
from onebase_engine.kernels.cpu.lowrank import UPDATE, update_tile
from onebase_engine.kernels.cpu.matmul4bit import MULTIPLY, multiply_tasks
from onebase_engine.kernels.cpu.sharing import STAGE, share
from onebase_engine.kernels.cpu.task import FLAG, NUMBER, WHOLE, Arguments, array
from onebase_engine.kernels.cpu.vector import f32_pointer, i64_pointer

PROJECTION = np.dtype(
    [
        (name, np.int64)
        for name in (
            *("codes", "out_features", "in_features", "weight", "absmax", "offsets", "scale_stride"),
            *("block", "bias", "product"),
            *("sites", "slots", "columns", "a", "b", "ranks", "scales", "spans"),
        )
    ]
)
"""A projection: what `PackedLinear.description` and `LowRankTable.description` say."""
LAYER = np.dtype(
    [
        # Addresses of norms' weights, 0 for none: before attention and MLP; of what the layer before gives from its
        # MLP, and this one from its attention; of queries and keys by head.
        *((name, np.int64) for name in ("first_norm", "second_norm", "behind_last", "behind_attention")),
        *((name, np.int64) for name in ("q_norm", "k_norm")),
        # Addresses of its keys and values, how far back it sees, and addresses of its rotation's angles.
        *((name, np.int64) for name in ("keys", "values", "window", "cos", "sin")),
        *((name, PROJECTION) for name in ("qkv", "o", "gate_up", "down")),
    ]
)
"""A layer. All of it is int64: the kernel reads a row of numbers, at the places that the fields have by name."""


def _places(record: np.dtype, *names: str) -> tuple[int, ...]:
    return tuple(record.fields[name][1] // 8 for name in names)  # type: ignore[index]  # it has fields


_FIRST_NORM, _SECOND_NORM, _Q_NORM, _K_NORM = _places(LAYER, "first_norm", "second_norm", "q_norm", "k_norm")
_BEHIND_LAST, _BEHIND_ATTENTION = _places(LAYER, "behind_last", "behind_attention")
_KEYS, _VALUES, _WINDOW, _COS, _SIN = _places(LAYER, "keys", "values", "window", "cos", "sin")
_QKV, _O, _GATE_UP, _DOWN = _places(LAYER, "qkv", "o", "gate_up", "down")
_CODES, _OUT, _IN, _WEIGHT = _places(PROJECTION, "codes", "out_features", "in_features", "weight")
_ABSMAX, _OFFSETS, _BLOCK, _BIAS = _places(PROJECTION, "absmax", "offsets", "block", "bias")
_STRIDE, _PRODUCT, _SITES = _places(PROJECTION, "scale_stride", "product", "sites")
_SLOTS, _COLUMNS, _A, _B = _places(PROJECTION, "slots", "columns", "a", "b")
_RANKS, _SCALES, _SPANS = _places(PROJECTION, "ranks", "scales", "spans")
_STAGES = 17
"""A layer's stages: four projections with three each; two norms, rotation, attention and gate."""

_write_norm, _write_rope, _write_attention, _write_gate = NORM.write, ROPE.write, ATTEND.write, GATE.write
_write_sums, _write_product, _write_update = SUM.write, MULTIPLY.write, UPDATE.write

LAYERS = Arguments(
    array(types.int64), WHOLE, array(types.int64), array(types.int64, 2), *[WHOLE] * 4, NUMBER, *[WHOLE] * 4,
    FLAG, NUMBER, FLAG, FLAG, array(types.int64), array(types.int32, 2), array(types.int64), array(types.int32, 2),
    array(types.int64), array(types.int64), array(types.int32, 2),
)  # fmt: skip
"""Addresses of the works, threads, the stages' counts, and the rest as `run_layers` has it."""
_read = LAYERS.read


@njit(nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _project(
    stage: int, threads: int, add_up: int, update: int, x: int, y: int, sums: int, rows: int, numbers: np.ndarray,
    tiles: np.ndarray,
) -> None:  # fmt: skip
    """A projection of x [rows, in] to y [rows, out], with the updates of each row's slot: three stages. With
    `add_up` 0 the sums of x are there."""
    n, k, sites, slots = numbers[_OUT], numbers[_IN], numbers[_SITES], numbers[_SLOTS]
    a = carray(i64_pointer(numbers[_A]), (slots,), np.int64)
    spans = carray(i64_pointer(numbers[_SPANS]), (slots,), np.int64)
    if numbers[_OFFSETS] != 0 and add_up != 0:
        share(stage, threads, rows, add_up, _write_sums((x, k, numbers[_BLOCK], sums)))
    product = _write_product((
        x, y, rows, numbers[_CODES], n, k, numbers[_WEIGHT], numbers[_ABSMAX], numbers[_OFFSETS], numbers[_STRIDE],
        sums, numbers[_BLOCK], numbers[_BIAS], tiles, a, spans,
    ))  # fmt: skip
    share(stage + STAGE, threads, multiply_tasks(rows, n), numbers[_PRODUCT], product)
    if tiles.shape[0] == 0:
        return
    columns = carray(i64_pointer(numbers[_COLUMNS]), (sites + 1,), np.int64)
    b = carray(i64_pointer(numbers[_B]), (sites, slots), np.int64)
    ranks = carray(i64_pointer(numbers[_RANKS]), (sites, slots), np.int64)
    scales = carray(f32_pointer(numbers[_SCALES]), (sites, slots), np.float32)
    change = _write_update((x, k, y, n, k, columns, tiles, a, b, ranks, scales))
    share(stage + 2 * STAGE, threads, tiles.shape[0], update, change)


@njit(nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _block(numbers: np.ndarray) -> int:
    """The block whose sums a projection takes; 0 for none."""
    block: int = numbers[_BLOCK] if numbers[_OFFSETS] != 0 else 0
    return block


@LAYERS.work
def _run(_: int, at: int) -> None:
    """One thread's way through all stages."""
    (
        works, threads, counts, layers, x, rows, hidden, intermediate, eps, heads, kv_heads, dim, turned,
        neighbours, scale, unit_offset, gelu, buffers, tiles, slots, items, positions, visible, tables,
    ) = _read(at)  # fmt: skip
    normalise, rotate, attend, gate, add_up, update = works
    normed, qkv, attended, change, gate_up, activated, sums = buffers
    width = (heads + 2 * kv_heads) * dim
    stages = (counts.ctypes.data + STAGE - 1) // STAGE * STAGE
    for index in range(layers.shape[0]):
        layer = layers[index]
        s = stages + index * _STAGES * STAGE
        added, k_cache, v_cache = 0 if index == 0 else change, layer[_KEYS], layer[_VALUES]
        norm = _write_norm((
            x, added, layer[_BEHIND_LAST], layer[_FIRST_NORM], unit_offset, normed, hidden, eps,
            _block(layer[_QKV:]), sums,
        ))  # fmt: skip
        share(s, threads, rows, normalise, norm)
        _project(s + STAGE, threads, 0, update, normed, qkv, sums, rows, layer[_QKV:], tiles)
        rope = _write_rope((
            qkv, layer[_Q_NORM], layer[_K_NORM], unit_offset, eps, layer[_COS], layer[_SIN], k_cache, v_cache,
            heads, kv_heads, dim, turned, neighbours, slots, positions,
        ))  # fmt: skip
        share(s + 4 * STAGE, threads, rows, rotate, rope)
        attention = _write_attention((
            qkv, width, attended, heads * dim, k_cache, v_cache, kv_heads, heads // kv_heads, dim, scale,
            layer[_WINDOW], items, positions, visible, tables,
        ))  # fmt: skip
        share(s + 5 * STAGE, threads, items.shape[0], attend, attention)
        _project(s + 6 * STAGE, threads, add_up, update, attended, change, sums, rows, layer[_O:], tiles)
        norm = _write_norm((
            x, change, layer[_BEHIND_ATTENTION], layer[_SECOND_NORM], unit_offset, normed, hidden, eps,
            _block(layer[_GATE_UP:]), sums,
        ))  # fmt: skip
        share(s + 9 * STAGE, threads, rows, normalise, norm)
        _project(s + 10 * STAGE, threads, 0, update, normed, gate_up, sums, rows, layer[_GATE_UP:], tiles)
        gated = _write_gate((gate_up, gelu, activated, intermediate, _block(layer[_DOWN:]), sums))
        share(s + 13 * STAGE, threads, rows, gate, gated)
        _project(s + 14 * STAGE, threads, 0, update, activated, change, sums, rows, layer[_DOWN:], tiles)


_run_all = LAYERS.kernel(_run)


def run_layers(
    threads: int, layers: np.ndarray, x: int, rows: int, hidden: int, intermediate: int, eps: float, heads: int,
    kv_heads: int, dim: int, turned: int, neighbours: bool, scale: float, unit_offset: bool, gelu: bool,
    buffers: np.ndarray, tiles: np.ndarray, slots: np.ndarray, items: np.ndarray, positions: np.ndarray,
    visible: np.ndarray, tables: np.ndarray,
) -> None:  # fmt: skip
    """x [rows, hidden] through all layers by so many threads, but for the last one's MLP output, which is left in
    the buffer `change`. `unit_offset` as in `add_rms_norm`, `gelu` as in `gate_mul`.

    `layers` [layers] of LAYER; `buffers` [7] int64, addresses of normed, qkv, attended,
    change, gate_up and activated, and of the sums of `sum_blocks`; the rest as in `rope_attend`.
    """
    works = [work.address for work in (norm_row, rope_row, attend_item, gate_row, sum_row, update_tile)]
    counts = np.zeros(len(layers) * _STAGES * STAGE // 8 + 8, np.int64)
    rows_of_numbers = layers.view(np.int64).reshape(len(layers), -1)
    _run_all(
        threads, np.array(works, np.int64), threads, counts, rows_of_numbers, x, rows, hidden, intermediate, eps,
        heads, kv_heads, dim, turned, neighbours, scale, unit_offset, gelu, buffers, tiles, slots, items, positions,
        visible, tables,
    )  # fmt: skip
