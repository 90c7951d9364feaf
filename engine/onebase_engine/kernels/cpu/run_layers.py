"""All layers of a decoder in one parallel region. A region of its own for each kernel costs microseconds, and its
end waits for every thread; two to three hundred a step cost more than the arithmetic that two cores share, and
several times that as soon as another program wants a core. Here threads share the tasks of one stage after another.

The kernels are the same, in the same order, as in `model.fused`: that is where to read what a layer does.
"""

import numpy as np
from numba import carray, njit, types

from onebase_engine.kernels.cpu.attention import ATTEND, attend_item
from onebase_engine.kernels.cpu.elementwise import GATE, NORM, ROPE, gate_row, norm_row, rope_row
from onebase_engine.kernels.cpu.lowrank import UPDATE, update_tile
from onebase_engine.kernels.cpu.matmul4bit import MULTIPLY, multiply_task, multiply_tasks
from onebase_engine.kernels.cpu.sharing import STAGE, share
from onebase_engine.kernels.cpu.task import FLAG, NUMBER, WHOLE, Arguments, array
from onebase_engine.kernels.cpu.vector import f32_pointer, i64_pointer

PROJECTION = 15
"""Numbers of a projection in a layer's row: what `PackedLinear.numbers` and `LowRankTable.numbers` give."""
FIRST_NORM, SECOND_NORM, BEHIND_LAST, BEHIND_ATTENTION, Q_NORM, K_NORM = range(6)
"""Places in a layer's row of the addresses of its norms' weights, 0 for none: before attention and MLP; of what the
layer before gives from its MLP, and this one from its attention; of queries and keys by head."""
KEYS, VALUES, WINDOW, COS, SIN = range(6, 11)
"""Of the addresses of its keys and values, how far back it sees, and of its rotation's angles."""
PROJECTIONS = 11
"""Where its four projections begin."""
_STAGES = 13
"""Of a layer: four projections with two each; two norms, rotation, attention and gate."""

_write_norm, _write_rope, _write_attention, _write_gate = NORM.write, ROPE.write, ATTEND.write, GATE.write
_write_product, _write_update = MULTIPLY.write, UPDATE.write

LAYERS = Arguments(
    array(types.int64), WHOLE, array(types.int64), array(types.int64, 2), *[WHOLE] * 4, NUMBER, *[WHOLE] * 3,
    NUMBER, FLAG, array(types.int64), array(types.int32, 2), array(types.int64), array(types.int32, 2),
    array(types.int64), array(types.int64), array(types.int32, 2),
)  # fmt: skip
"""Addresses of the works, threads, the stages' counts, and the rest as `run_layers` has it."""
_read = LAYERS.read


@njit(nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _project(
    stage: int, threads: int, multiply: int, update: int, x: int, y: int, rows: int, numbers: np.ndarray,
    tiles: np.ndarray,
) -> None:  # fmt: skip
    """A projection of x [rows, in] to y [rows, out], with the updates of each row's slot: two stages."""
    n, k, sites, slots = numbers[1], numbers[2], numbers[7], numbers[8]
    a = carray(i64_pointer(numbers[10]), (slots,), np.int64)
    spans = carray(i64_pointer(numbers[14]), (slots,), np.int64)
    product = _write_product((
        x, y, rows, numbers[0], n, k, numbers[3], numbers[4], numbers[5], numbers[6], tiles, a, spans
    ))  # fmt: skip
    share(stage, threads, multiply_tasks(rows, n), multiply, product)
    if tiles.shape[0] == 0:
        return
    columns = carray(i64_pointer(numbers[9]), (sites + 1,), np.int64)
    b = carray(i64_pointer(numbers[11]), (sites, slots), np.int64)
    ranks = carray(i64_pointer(numbers[12]), (sites, slots), np.int64)
    scales = carray(f32_pointer(numbers[13]), (sites, slots), np.float32)
    change = _write_update((x, k, y, n, k, columns, tiles, a, b, ranks, scales))
    share(stage + STAGE, threads, tiles.shape[0], update, change)


@LAYERS.work
def _run(_: int, at: int) -> None:
    """One thread's way through all stages."""
    (
        works, threads, counts, layers, x, rows, hidden, intermediate, eps, heads, kv_heads, dim, scale, gemma,
        buffers, tiles, slots, items, positions, visible, tables,
    ) = _read(at)  # fmt: skip
    normalise, rotate, attend, gate, multiply, update = works
    normed, qkv, attended, change, gate_up, activated = buffers
    width = (heads + 2 * kv_heads) * dim
    stages = (counts.ctypes.data + STAGE - 1) // STAGE * STAGE
    for index in range(layers.shape[0]):
        layer = layers[index]
        at, s = PROJECTIONS, stages + index * _STAGES * STAGE
        added, k_cache, v_cache = 0 if index == 0 else change, layer[KEYS], layer[VALUES]
        norm = _write_norm((x, added, layer[BEHIND_LAST], layer[FIRST_NORM], gemma, normed, hidden, eps))
        share(s, threads, rows, normalise, norm)
        _project(s + STAGE, threads, multiply, update, normed, qkv, rows, layer[at:], tiles)
        rope = _write_rope((
            qkv, layer[Q_NORM], layer[K_NORM], gemma, eps, layer[COS], layer[SIN], k_cache, v_cache,
            heads, kv_heads, dim, slots, positions,
        ))  # fmt: skip
        share(s + 3 * STAGE, threads, rows, rotate, rope)
        attention = _write_attention((
            qkv, width, attended, heads * dim, k_cache, v_cache, kv_heads, heads // kv_heads, dim, scale,
            layer[WINDOW], items, positions, visible, tables,
        ))  # fmt: skip
        share(s + 4 * STAGE, threads, items.shape[0], attend, attention)
        at += PROJECTION
        _project(
            s + 5 * STAGE, threads, multiply, update, attended, change, rows, layer[at : at + PROJECTION], tiles
        )
        norm = _write_norm((
            x, change, layer[BEHIND_ATTENTION], layer[SECOND_NORM], gemma, normed, hidden, eps
        ))  # fmt: skip
        share(s + 7 * STAGE, threads, rows, normalise, norm)
        at += PROJECTION
        _project(
            s + 8 * STAGE, threads, multiply, update, normed, gate_up, rows, layer[at : at + PROJECTION], tiles
        )
        share(s + 10 * STAGE, threads, rows, gate, _write_gate((gate_up, gemma, activated, intermediate)))
        at += PROJECTION
        _project(
            s + 11 * STAGE, threads, multiply, update, activated, change, rows, layer[at : at + PROJECTION], tiles
        )


_run_all = LAYERS.kernel(_run)


def run_layers(
    threads: int, layers: np.ndarray, x: int, rows: int, hidden: int, intermediate: int, eps: float, heads: int,
    kv_heads: int, dim: int, scale: float, gemma: bool, buffers: np.ndarray, tiles: np.ndarray, slots: np.ndarray,
    items: np.ndarray, positions: np.ndarray, visible: np.ndarray, tables: np.ndarray,
) -> None:  # fmt: skip
    """x [rows, hidden] through all layers by so many threads, but for the last one's MLP output, which is left in
    the buffer `change`. `gemma`: norms as in `add_rms_norm`, and gelu.

    `layers` [layers, PROJECTIONS + 4 * PROJECTION] int64; `buffers` [6] int64, addresses of normed, qkv, attended,
    change, gate_up and activated; the rest as in `rope_attend`.
    """
    works = [work.address for work in (norm_row, rope_row, attend_item, gate_row, multiply_task, update_tile)]
    counts = np.zeros(len(layers) * _STAGES * STAGE // 8 + 8, np.int64)
    _run_all(
        threads, np.array(works, np.int64), threads, counts, layers, x, rows, hidden, intermediate, eps, heads,
        kv_heads, dim, scale, gemma, buffers, tiles, slots, items, positions, visible, tables,
    )  # fmt: skip
