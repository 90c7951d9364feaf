"""Stages of shared work: every task is done once, in order of stages, by however many threads there are."""

import numpy as np
import pytest
from numba import njit, prange

from onebase_adapters.kernels.cpu.sharing import STAGE, shared


@njit  # type: ignore[untyped-decorator]
def _task(task: int, stage: int, done: np.ndarray, seen: np.ndarray) -> None:
    if stage > 0:
        seen[stage, task] = done[stage - 1].sum()
    done[stage, task] += 1


_share = shared(_task)


@njit  # type: ignore[untyped-decorator]
def _work(threads: int, counts: np.ndarray, done: np.ndarray, seen: np.ndarray) -> None:
    for stage in range(done.shape[0]):
        _share(counts.ctypes.data + stage * STAGE, threads, done.shape[1], stage, done, seen)


@njit(parallel=True)  # type: ignore[untyped-decorator]
def _run(threads: int, counts: np.ndarray, done: np.ndarray, seen: np.ndarray) -> None:
    for _ in prange(threads):
        _work(threads, counts, done, seen)


@pytest.mark.parametrize("threads", [1, 2, 7])
@pytest.mark.parametrize("tasks", [1, 5, 64])
def test_each_task_is_done_once_and_after_the_stage_before(threads: int, tasks: int) -> None:
    """Also where there are fewer threads than were counted on: then some come late, to work that is done."""
    counts = np.zeros(200 * STAGE // 8, np.int64)
    done, seen = np.zeros((2, 200, tasks), np.int64)
    _run(threads, counts, done, seen)
    assert (done == 1).all()
    assert (seen[1:] == tasks).all()
