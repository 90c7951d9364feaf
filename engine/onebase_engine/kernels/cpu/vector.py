"""What numba lacks for bfloat16: conversions, addresses as pointers, and a maximum that LLVM vectorises."""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

I64 = ir.IntType(64)
I8 = ir.IntType(8)
I16 = ir.IntType(16)
I32 = ir.IntType(32)
F32 = ir.FloatType()


@intrinsic  # type: ignore[untyped-decorator]
def u16_pointer(typingctx: Any, address: Any) -> Any:
    """An integer address as a pointer to uint16 (the bits of bfloat16), for `carray`."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], I16.as_pointer())

    return types.CPointer(types.uint16)(types.int64), codegen


@intrinsic  # type: ignore[untyped-decorator]
def f32_pointer(typingctx: Any, address: Any) -> Any:
    """An integer address as a pointer to float32, for `carray`."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], F32.as_pointer())

    return types.CPointer(types.float32)(types.int64), codegen


@intrinsic  # type: ignore[untyped-decorator]
def i64_pointer(typingctx: Any, address: Any) -> Any:
    """An integer address as a pointer to int64, for `carray`."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], I64.as_pointer())

    return types.CPointer(types.int64)(types.int64), codegen


@intrinsic  # type: ignore[untyped-decorator]
def f32_from_bf16(typingctx: Any, bits: Any) -> Any:
    """bfloat16 bits (uint16) to float32, exact."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        wide = builder.zext(args[0], ir.IntType(32))
        return builder.bitcast(builder.shl(wide, ir.Constant(ir.IntType(32), 16)), F32)

    return types.float32(types.uint16), codegen


@intrinsic  # type: ignore[untyped-decorator]
def bf16_from_f32(typingctx: Any, value: Any) -> Any:
    """float32 to bfloat16 bits, rounded to nearest even; NaN stays NaN."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        i32 = ir.IntType(32)
        bits = builder.bitcast(args[0], i32)
        odd = builder.and_(builder.lshr(bits, ir.Constant(i32, 16)), ir.Constant(i32, 1))
        rounded = builder.add(bits, builder.add(odd, ir.Constant(i32, 0x7FFF)))
        is_nan = builder.fcmp_unordered("uno", args[0], args[0])
        kept = builder.select(is_nan, ir.Constant(i32, 0x7FC00000), rounded)
        return builder.trunc(builder.lshr(kept, ir.Constant(i32, 16)), I16)

    return types.uint16(types.float32), codegen


@intrinsic  # type: ignore[untyped-decorator]
def power_of_two(typingctx: Any, exponent: Any) -> Any:
    """2**exponent for a whole float32 in -126..127, put together from bits (numba itself would widen to int64)."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        i32 = ir.IntType(32)
        biased = builder.add(builder.fptosi(args[0], i32), ir.Constant(i32, 127))
        return builder.bitcast(builder.shl(biased, ir.Constant(i32, 23)), F32)

    return types.float32(types.float32), codegen


@intrinsic  # type: ignore[untyped-decorator]
def larger(typingctx: Any, a: Any, b: Any) -> Any:
    """The larger of two float32 that are not NaN. Python's `max` becomes a branch that LLVM does not recognise as a
    maximum, so that a loop of it stays scalar."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        function = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(F32, [F32, F32]), "llvm.maxnum.f32"
        )
        return builder.call(function, args, fastmath=("nnan", "nsz"))

    return types.float32(types.float32, types.float32), codegen
