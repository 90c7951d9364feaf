"""All layers of a decoder in one parallel region. A region of its own for each kernel costs microseconds, and its
end waits for every thread; two to three hundred a step cost more than the arithmetic that two cores share, and
several times that as soon as another program wants a core. Here threads share the tasks of one stage after another.

The kernels are the same, in the same order, as in `model.fused`: that is where to read what a layer does.
"""

import numpy as np
from numba import carray, njit, prange

from onebase_adapters.kernels.cpu.attention import attend_item
from onebase_adapters.kernels.cpu.elementwise import gate_row, norm_row, rope_row
from onebase_adapters.kernels.cpu.lowrank import update_tile
from onebase_adapters.kernels.cpu.matmul4bit import multiply_task, multiply_tasks
from onebase_adapters.kernels.cpu.sharing import STAGE, shared
from onebase_adapters.kernels.cpu.vector import f32_pointer, i64_pointer

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

_normalise, _rotate, _attend, _gate = shared(norm_row), shared(rope_row), shared(attend_item), shared(gate_row)
_multiply, _update = shared(multiply_task), shared(update_tile)


@njit(cache=True, nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _project(stage: int, threads: int, x: int, y: int, rows: int, numbers: np.ndarray, tiles: np.ndarray) -> None:
    """A projection of x [rows, in] to y [rows, out], with the updates of each row's slot: two stages."""
    n, k, sites, slots = numbers[1], numbers[2], numbers[7], numbers[8]
    a = carray(i64_pointer(numbers[10]), (slots,), np.int64)
    spans = carray(i64_pointer(numbers[14]), (slots,), np.int64)
    _multiply(
        stage, threads, multiply_tasks(rows, n),
        x, y, rows, numbers[0], n, k, numbers[3], numbers[4], numbers[5], numbers[6], tiles, a, spans,
    )  # fmt: skip
    if tiles.shape[0] == 0:
        return
    columns = carray(i64_pointer(numbers[9]), (sites + 1,), np.int64)
    b = carray(i64_pointer(numbers[11]), (sites, slots), np.int64)
    ranks = carray(i64_pointer(numbers[12]), (sites, slots), np.int64)
    scales = carray(f32_pointer(numbers[13]), (sites, slots), np.float32)
    _update(stage + STAGE, threads, tiles.shape[0], x, k, y, n, k, columns, tiles, a, b, ranks, scales)


@njit(cache=True, nogil=True, error_model="numpy", parallel=True)  # type: ignore[untyped-decorator]
def run_layers(
    threads: int,
    layers: np.ndarray,
    x: int,
    rows: int,
    hidden: int,
    intermediate: int,
    eps: float,
    heads: int,
    kv_heads: int,
    dim: int,
    scale: float,
    gemma: bool,
    buffers: np.ndarray,
    tiles: np.ndarray,
    slots: np.ndarray,
    items: np.ndarray,
    positions: np.ndarray,
    visible: np.ndarray,
    tables: np.ndarray,
) -> None:
    """x [rows, hidden] through all layers by so many threads, but for the last one's MLP output, which is left in
    the buffer `change`. `gemma`: norms as in `add_rms_norm`, and gelu.

    `layers` [layers, PROJECTIONS + 4 * PROJECTION] int64; `buffers` [6] int64, addresses of normed, qkv, attended,
    change, gate_up and activated; the rest as in `rope_attend`.
    """
    counts = np.zeros(layers.shape[0] * _STAGES * STAGE // 8 + 8, np.int64)
    for _ in prange(threads):
        _run(
            threads, counts, layers, x, rows, hidden, intermediate, eps, heads, kv_heads, dim, scale, gemma,
            buffers, tiles, slots, items, positions, visible, tables,
        )  # fmt: skip


@njit(cache=True, nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _run(
    threads: int,
    counts: np.ndarray,
    layers: np.ndarray, x: int, rows: int, hidden: int, intermediate: int, eps: float,
    heads: int, kv_heads: int, dim: int, scale: float, gemma: bool, buffers: np.ndarray,
    tiles: np.ndarray, slots: np.ndarray, items: np.ndarray, positions: np.ndarray, visible: np.ndarray,
    tables: np.ndarray,
) -> None:  # fmt: skip
    """One thread's way through all stages."""
    normed, qkv, attended, change, gate_up, activated = buffers
    width = (heads + 2 * kv_heads) * dim
    # Not the address alone from outside: numba would free the array after its last use there.
    stages = (counts.ctypes.data + STAGE - 1) // STAGE * STAGE
    for index in range(layers.shape[0]):
        layer = layers[index]
        at, s = PROJECTIONS, stages + index * _STAGES * STAGE
        added, k_cache, v_cache = 0 if index == 0 else change, layer[KEYS], layer[VALUES]
        _normalise(
            s, threads, rows, x, added, layer[BEHIND_LAST], layer[FIRST_NORM], gemma, normed, hidden, eps
        )  # fmt: skip
        _project(s + STAGE, threads, normed, qkv, rows, layer[at : at + PROJECTION], tiles)
        _rotate(
            s + 3 * STAGE, threads, rows,
            qkv, layer[Q_NORM], layer[K_NORM], gemma, eps, layer[COS], layer[SIN], k_cache, v_cache,
            heads, kv_heads, dim, slots, positions,
        )  # fmt: skip
        _attend(
            s + 4 * STAGE, threads, items.shape[0],
            qkv, width, attended, heads * dim, k_cache, v_cache, kv_heads, heads // kv_heads, dim, scale,
            layer[WINDOW], items, positions, visible, tables,
        )  # fmt: skip
        at += PROJECTION
        _project(s + 5 * STAGE, threads, attended, change, rows, layer[at : at + PROJECTION], tiles)
        _normalise(
            s + 7 * STAGE, threads, rows,
            x, change, layer[BEHIND_ATTENTION], layer[SECOND_NORM], gemma, normed, hidden, eps,
        )  # fmt: skip
        at += PROJECTION
        _project(s + 8 * STAGE, threads, normed, gate_up, rows, layer[at : at + PROJECTION], tiles)
        _gate(s + 10 * STAGE, threads, rows, gate_up, gemma, activated, intermediate)
        at += PROJECTION
        _project(s + 11 * STAGE, threads, activated, change, rows, layer[at : at + PROJECTION], tiles)
