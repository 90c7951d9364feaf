"""Explicit SIMD for numba: bfloat16 conversions and one small matrix-product tile, emitted as LLVM vectors.

Invariant: the arithmetic of a row, and its order, depend neither on how many rows a tile has nor on where the
row lies in it. Each row has its own accumulators, advanced in the same order of depth in every variant, with
no licence for LLVM to reassociate. That is what makes a token's numbers independent of its neighbours.
"""

from collections.abc import Callable
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
LANES = 16
"""float32 lanes of a tile's column group: one AVX-512 register, two AVX2, four NEON."""


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


def matmul_tile(rows: int, groups: int, unroll: int, *, prefetch: bool = False) -> Callable[..., None]:
    """Make `tile(c, ldc, a, lda, b, ldb, depth, ahead)`: C += A B for one tile, all arguments int64.

    C [rows, groups*16] float32, A [rows, depth] float32, B [depth, groups*16] bfloat16; `c`, `a`, `b` are
    addresses, `ldc`, `lda`, `ldb` row strides in elements; `depth` a multiple of `unroll`. `unroll` sets how
    many partial sums a lane keeps (step k goes to sum k mod unroll; they are added in order at the end), so
    tiles that must agree bit for bit need the same `unroll`. With `prefetch`, what lies `ahead` bytes after each
    part of B that is read is brought into the cache on the way: the B that the caller will need next.
    """
    vec_f32 = ir.VectorType(F32, LANES)
    vec_i16 = ir.VectorType(I16, LANES)
    vec_i32 = ir.VectorType(ir.IntType(32), LANES)
    shift = ir.Constant(vec_i32, [16] * LANES)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        c, ldc, a, lda, b, ldb, depth, ahead = args
        fma_type = ir.FunctionType(vec_f32, [vec_f32, vec_f32, vec_f32])
        fma = cgutils.get_or_insert_function(builder.module, fma_type, f"llvm.fma.v{LANES}f32")

        def const(value: int) -> Any:
            return ir.Constant(I64, value)

        def address(base: Any, elements: Any, width: int, kind: Any) -> Any:
            return builder.inttoptr(builder.add(base, builder.mul(elements, const(width))), kind.as_pointer())

        prefetch_type = ir.FunctionType(ir.VoidType(), [I8.as_pointer(), I32, I32, I32])
        fetch = cgutils.get_or_insert_function(builder.module, prefetch_type, "llvm.prefetch.p0")
        # Read, into the second-level cache, data.
        hints = [ir.Constant(I32, 0), ir.Constant(I32, 2), ir.Constant(I32, 1)]

        def c_pointer(row: int, group: int) -> Any:
            offset = builder.add(builder.mul(const(row), ldc), const(group * LANES))
            return address(c, offset, 4, vec_f32)

        sums = [
            [[cgutils.alloca_once(builder, vec_f32) for _ in range(unroll)] for _ in range(groups)]
            for _ in range(rows)
        ]
        for row in range(rows):
            for group in range(groups):
                for k in range(unroll):
                    start = ir.Constant(vec_f32, [0.0] * LANES)
                    if k == 0:
                        start = builder.load(c_pointer(row, group), align=4)
                    builder.store(start, sums[row][group][k])

        zero = const(0)
        with cgutils.for_range_slice(builder, zero, depth, const(unroll), I64) as (step, _):
            for k in range(unroll):
                index = builder.add(step, const(k))
                b_row = builder.mul(index, ldb)
                b_vectors = []
                for group in range(groups):
                    pointer = address(b, builder.add(b_row, const(group * LANES)), 2, vec_i16)
                    if prefetch and group % 2 == 0:  # two groups are one 64-byte line
                        later = builder.add(builder.ptrtoint(pointer, I64), ahead)
                        builder.call(fetch, [builder.inttoptr(later, I8.as_pointer()), *hints])
                    wide = builder.zext(builder.load(pointer, align=2), vec_i32)
                    b_vectors.append(builder.bitcast(builder.shl(wide, shift), vec_f32))
                for row in range(rows):
                    element = builder.load(
                        address(a, builder.add(builder.mul(const(row), lda), index), 4, F32), align=4
                    )
                    one = builder.insert_element(
                        ir.Constant(vec_f32, ir.Undefined), element, ir.Constant(ir.IntType(32), 0)
                    )
                    spread = builder.shuffle_vector(one, one, ir.Constant(vec_i32, [0] * LANES))
                    for group in range(groups):
                        slot = sums[row][group][k]
                        builder.store(builder.call(fma, [spread, b_vectors[group], builder.load(slot)]), slot)

        for row in range(rows):
            for group in range(groups):
                total = builder.load(sums[row][group][0])
                for k in range(1, unroll):
                    total = builder.fadd(total, builder.load(sums[row][group][k]))
                builder.store(total, c_pointer(row, group), align=4)
        return context.get_dummy_value()

    @intrinsic  # type: ignore[untyped-decorator]
    def tile(typingctx: Any, c: Any, ldc: Any, a: Any, lda: Any, b: Any, ldb: Any, depth: Any, ahead: Any) -> Any:
        return types.void(*([types.int64] * 8)), codegen

    made: Callable[..., None] = tile
    return made
