"""Stages of work that threads share inside one parallel region.

Threads take tasks as they come to them. Invariant: a stage is over when all its tasks are done, whoever did them.
So nobody waits for a thread that has no task: one that the system has put aside, because other programs want its
core, holds up the task that it is in and nothing else, and finds the later stages done when it returns.
"""

from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from onebase_engine.kernels.cpu.task import invoke
from onebase_engine.kernels.cpu.vector import I32, I64

STAGE = 64
"""Bytes of a stage, a line of the cache: int64 counts of tasks taken and of tasks done, zero at first."""
_SPINS = 2000
"""Looks at a stage (some 20 microseconds) before a waiting thread offers its core to others each time."""


@intrinsic  # type: ignore[untyped-decorator]
def _add(typingctx: Any, address: Any, value: Any) -> Any:
    """Atomically add to an int64; returns what was there before."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.atomic_rmw("add", builder.inttoptr(args[0], I64.as_pointer()), args[1], "seq_cst")

    return types.int64(types.int64, types.int64), codegen


@intrinsic  # type: ignore[untyped-decorator]
def _read(typingctx: Any, address: Any) -> Any:
    """An int64 as other threads left it."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load_atomic(builder.inttoptr(args[0], I64.as_pointer()), "acquire", 8)

    return types.int64(types.int64), codegen


@intrinsic  # type: ignore[untyped-decorator]
def _yield(typingctx: Any) -> Any:
    """Let other threads of the system have the core."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(I32, []), "sched_yield")
        return builder.call(function, [])

    return types.int32(), codegen


@njit(nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def share(stage: int, threads: int, tasks: int, work: int, at: int) -> None:
    """Do so many tasks of the work at an address, by so many threads that all call this with the same address
    `stage`; returns once all are done."""
    # Few enough at once that threads end together, not more takes than pay.
    count = max(1, tasks // (3 * threads))
    first = _add(stage, count)
    while first < tasks:
        last = min(first + count, tasks)
        for task in range(first, last):
            invoke(work, task, at)
        _add(stage + 8, last - first)
        first = _add(stage, count)
    looks = 0
    while _read(stage + 8) < tasks:
        looks += 1
        if looks > _SPINS:
            _yield()
