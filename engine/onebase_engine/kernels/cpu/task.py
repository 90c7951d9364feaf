"""Kernels as tasks that threads share, each kind compiled once, by itself, and called through its address.

numba compiles what a function calls into it again, at each level of calls, and four times for a loop that is
parallel. So a kernel's work is a function of a task's number and of where its arguments lie, and what deals tasks
out to threads is the same code for all kernels.
"""

from collections.abc import Callable
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from llvmlite import ir
from numba import njit, prange, types
from numba.core import cgutils
from numba.extending import intrinsic

from onebase_engine.kernels.cpu.cache import KernelCache
from onebase_engine.kernels.cpu.vector import I64

WHOLE = types.int64
NUMBER = types.float64
FLAG = types.boolean


def array(kind: Any, dimensions: int = 1) -> Any:
    """The type of a C-contiguous array."""
    return types.Array(kind, dimensions, "C")


class Compiled:
    """A function with one signature, compiled or read from the disk when it is first needed."""

    known: ClassVar["list[Compiled]"] = []
    """All that there are, for `build`."""

    def __init__(self, function: Callable[..., Any], name: str, kinds: tuple[Any, ...], **options: Any) -> None:
        self.name = name
        self.function = njit(nogil=True, error_model="numpy", **options)(function)
        self.cache = self.function._cache = KernelCache(name)
        self._kinds = kinds
        self.known.append(self)

    @property
    def present(self) -> bool:
        """Whether it need not be compiled."""
        return self.cache.present(self._kinds)

    def prepare(self) -> None:
        """Compile it, or read it from the disk."""
        self.function.compile(self._kinds)

    @cached_property
    def call(self) -> Any:
        """The function, once it is there."""
        self.prepare()
        return self.function

    @cached_property
    def address(self) -> int:
        """The address of its code."""
        made = self.call.overloads[self._kinds]
        address: int = made.library.get_pointer_to_function(made.fndesc.llvm_func_name)
        return address


@intrinsic  # type: ignore[untyped-decorator]
def invoke(typingctx: Any, address: Any, task: Any, at: Any) -> Any:
    """Do one task of the work at an address."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _call(context, builder, *args)

    return types.void(WHOLE, WHOLE, WHOLE), codegen


def _region(address: int, tasks: int, at: int) -> None:
    for task in prange(tasks):
        invoke(address, np.int64(task), at)


REGION = Compiled(_region, "region", (WHOLE, WHOLE, WHOLE), parallel=True)
"""All of so many tasks, by all threads."""


@intrinsic  # type: ignore[untyped-decorator]
def _by_all_threads(typingctx: Any, region: Any, address: Any, tasks: Any, at: Any) -> Any:
    """Run `REGION`, by its address: called by its name, it would be compiled into each kernel."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _call(context, builder, *args)

    return types.void(WHOLE, WHOLE, WHOLE, WHOLE), codegen


def _call(context: Any, builder: Any, address: Any, *args: Any) -> Any:
    """Call the function of int64 at an address, and return as it does where it fails."""
    kinds = [WHOLE] * len(args)
    function = builder.inttoptr(address, context.call_conv.get_function_type(types.void, kinds).as_pointer())
    status, _ = context.call_conv.call_function(builder, function, types.void, kinds, args)
    with cgutils.if_unlikely(builder, status.is_error):
        context.call_conv.return_status_propagate(builder, status)
    return context.get_dummy_value()


class Arguments:
    """The arguments of a kind of work, and how they lie in memory: `write` and `read` are for compiled code."""

    def __init__(self, *kinds: Any) -> None:
        self.kinds = kinds
        whole = types.Tuple(kinds)

        @intrinsic  # type: ignore[untyped-decorator]
        def write(typingctx: Any, values: Any) -> Any:
            """Put a tuple where work can read it, until the caller returns; gives the address. Arrays must live as
            long: they are not counted."""

            def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
                place = cgutils.alloca_once(builder, _layout(context, kinds))
                for index, (given, kind) in enumerate(zip(signature.args[0], kinds, strict=True)):
                    value = context.cast(builder, builder.extract_value(args[0], index), given, kind)
                    if isinstance(kind, types.Array):
                        held = context.make_array(kind)(context, builder, value=value)
                        held.meminfo = cgutils.get_null_value(held.meminfo.type)
                        value = held._getvalue()
                    builder.store(value, cgutils.gep_inbounds(builder, place, 0, index))
                return builder.ptrtoint(place, I64)

            return WHOLE(values), codegen

        @intrinsic  # type: ignore[untyped-decorator]
        def read(typingctx: Any, at: Any) -> Any:
            """The tuple at an address."""

            def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
                place = builder.inttoptr(args[0], _layout(context, kinds).as_pointer())
                values = [
                    builder.load(cgutils.gep_inbounds(builder, place, 0, index)) for index in range(len(kinds))
                ]
                return context.make_tuple(builder, whole, values)

            return whole(WHOLE), codegen

        self.write = write
        self.read = read

    def work(self, function: Callable[[int, int], None]) -> Compiled:
        """Make `function(task, at)` work of this kind."""
        return Compiled(function, _named(function), (WHOLE, WHOLE))

    def kernel(self, work: Compiled, *, serial: int = 0) -> Callable[..., None]:
        """Make `kernel(tasks, *arguments)`: all tasks of `work`, by all threads if there are more than `serial`."""
        write = self.write

        def run(region: int, address: int, tasks: int, *arguments: Any) -> None:
            at = write(arguments)
            if tasks > serial:
                _by_all_threads(region, address, tasks, at)
            else:
                for task in range(tasks):
                    invoke(address, task, at)

        front = Compiled(run, f"{work.name}.all", (WHOLE, WHOLE, WHOLE, types.Tuple(self.kinds)))

        def kernel(tasks: int, *arguments: Any) -> None:
            front.call(REGION.address, work.address, tasks, *arguments)

        return kernel


def _layout(context: Any, kinds: tuple[Any, ...]) -> Any:
    return ir.LiteralStructType([context.get_value_type(kind) for kind in kinds])


def _named(function: Callable[..., Any]) -> str:
    return f"{function.__module__.rpartition('.')[2]}.{function.__name__}"
