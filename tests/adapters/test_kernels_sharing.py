"""Stages of shared work: every task is done once, in order of stages, by however many threads there are."""

from collections.abc import Callable, Iterator

import numpy as np
import pytest
from numba import types

from onebase_engine.kernels.cpu.sharing import STAGE, share
from onebase_engine.kernels.cpu.task import WHOLE, Arguments, Compiled, array

_TASK = Arguments(WHOLE, array(types.int64, 2), array(types.int64, 2))
_STAGES = Arguments(WHOLE, WHOLE, array(types.int64), array(types.int64, 2), array(types.int64, 2))
_read_task, _write_task, _read = _TASK.read, _TASK.write, _STAGES.read


def _note(task: int, at: int) -> None:
    stage, done, seen = _read_task(at)
    if stage > 0:
        seen[stage, task] = done[stage - 1].sum()
    done[stage, task] += 1


def _work(_: int, at: int) -> None:
    work, threads, counts, done, seen = _read(at)
    stages = counts.ctypes.data
    for stage in range(done.shape[0]):
        share(stages + stage * STAGE, threads, done.shape[1], work, _write_task((stage, done, seen)))


@pytest.fixture(scope="module")
def kernel() -> Iterator[tuple[Callable[..., None], Compiled]]:
    """Stages of shared work, and what they do; not among the server's kernels."""
    with pytest.MonkeyPatch.context() as apart:
        apart.setattr(Compiled, "known", [])
        yield _STAGES.kernel(_STAGES.work(_work)), _TASK.work(_note)


@pytest.mark.parametrize("threads", [1, 2, 7])
@pytest.mark.parametrize("tasks", [1, 5, 64])
def test_each_task_is_done_once_and_after_the_stage_before(
    threads: int, tasks: int, kernel: tuple[Callable[..., None], Compiled]
) -> None:
    """Also where there are fewer threads than were counted on: then some come late, to work that is done."""
    counts = np.zeros(200 * STAGE // 8, np.int64)
    done, seen = np.zeros((2, 200, tasks), np.int64)
    run, note = kernel
    run(threads, note.address, threads, counts, done, seen)
    assert (done == 1).all()
    assert (seen[1:] == tasks).all()
