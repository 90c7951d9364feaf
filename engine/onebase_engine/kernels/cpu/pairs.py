"""One small matrix product in bfloat16 for all kernels that have one, emitted as LLVM vectors.

Numbers go through in pairs along the sum: one instruction of AVX-512 BF16 multiplies 16 pairs by another and adds
both products to 16 float32 sums. Where a processor has no such instruction, it is two multiplications of float32.

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

from onebase_engine.kernels.cpu.target import TARGET, Target
from onebase_engine.kernels.cpu.vector import F32, I8, I16, I32, I64

LANES = 16
"""float32 lanes of a tile's column group: one AVX-512 register, two AVX2, four NEON."""


class _BFloat(ir.Type):  # type: ignore[misc]
    """LLVM's bfloat, which llvmlite has no name for."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


SUMS = ir.VectorType(F32, LANES)
PAIRS = ir.VectorType(_BFloat(), 2 * LANES)
_NARROW = ir.VectorType(_BFloat(), LANES)
_WORDS = ir.VectorType(I16, LANES)
_LONGS = ir.VectorType(I32, LANES)
_SHIFT = ir.Constant(_LONGS, [16] * LANES)
_HIGH = ir.Constant(_LONGS, [0xFFFF0000] * LANES)
_INTERLEAVED = [place for lane in range(LANES) for place in (lane, LANES + lane)]


def declare(builder: Any, name: str, result: Any, *arguments: Any) -> Any:
    """A function of LLVM's, or of the processor's."""
    return cgutils.get_or_insert_function(builder.module, ir.FunctionType(result, arguments), name)


def place(builder: Any, base: Any, offset: Any, kind: Any) -> Any:
    """The address `base` + `offset` bytes as a pointer."""
    return builder.inttoptr(builder.add(base, offset), kind.as_pointer())


def spread(builder: Any, pair: Any) -> Any:
    """A pair (as 32 bits) in all lanes."""
    one = builder.insert_element(ir.Constant(_LONGS, ir.Undefined), pair, ir.Constant(I32, 0))
    return builder.shuffle_vector(one, one, ir.Constant(_LONGS, [0] * LANES))


def factors(builder: Any, pairs: Any, target: Target) -> tuple[Any, ...]:
    """[LANES] pairs as `add_products` takes them: as they are, or the first and the second numbers as float32."""
    if target.pairs:
        return (builder.bitcast(pairs, PAIRS),)
    first = builder.bitcast(builder.shl(pairs, _SHIFT), SUMS)
    return first, builder.bitcast(builder.and_(pairs, _HIGH), SUMS)


def add_products(builder: Any, sums: Any, a: tuple[Any, ...], b: tuple[Any, ...]) -> Any:
    """sums + a0 b0 + a1 b1, lane by lane, of factors."""
    if len(a) == 1:
        dot = declare(builder, "llvm.x86.avx512bf16.dpbf16ps.512", SUMS, SUMS, PAIRS, PAIRS)
        return builder.call(dot, [sums, *a, *b])
    fma = declare(builder, f"llvm.fma.v{LANES}f32", SUMS, SUMS, SUMS, SUMS)
    for x, y in zip(a, b, strict=True):
        sums = builder.call(fma, [x, y, sums])
    return sums


def parts(rows: int, columns: int, sums: int, target: Target) -> list[tuple[range, range]]:
    """A tile's rows and columns, each cell of so many sums, cut into what the target's registers hold at a time."""
    most = max(1, target.accumulators // sums)
    height = min(rows, most)
    width = min(columns, most // height)
    return [
        (range(row, min(row + height, rows)), range(column, min(column + width, columns)))
        for row in range(0, rows, height)
        for column in range(0, columns, width)
    ]


def narrowed(builder: Any, values: Any, target: Target) -> Any:
    """float32 lanes as bfloat16, rounded to nearest even."""
    if target.pairs:
        narrow = declare(builder, "llvm.x86.avx512bf16.cvtneps2bf16.512", _NARROW, SUMS)
        return builder.bitcast(builder.call(narrow, [values]), _WORDS)
    bits = builder.bitcast(values, _LONGS)
    odd = builder.and_(builder.lshr(bits, _SHIFT), ir.Constant(_LONGS, [1] * LANES))
    rounded = builder.add(bits, builder.add(odd, ir.Constant(_LONGS, [0x7FFF] * LANES)))
    is_nan = builder.fcmp_unordered("uno", values, values)
    kept = builder.select(is_nan, ir.Constant(_LONGS, [0x7FC00000] * LANES), rounded)
    return builder.trunc(builder.lshr(kept, _SHIFT), _WORDS)


@intrinsic  # type: ignore[untyped-decorator]
def narrow_rows(typingctx: Any, target: Any, source: Any, lanes: Any) -> Any:
    """target = source: addresses of bfloat16 and of float32, `lanes` of them, a multiple of 16."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        target, source, lanes = args
        with cgutils.for_range_slice(builder, ir.Constant(I64, 0), lanes, ir.Constant(I64, LANES), I64) as (
            lane,
            _,
        ):
            values = builder.load(place(builder, source, builder.mul(lane, ir.Constant(I64, 4)), SUMS), align=4)
            at = place(builder, target, builder.mul(lane, ir.Constant(I64, 2)), _WORDS)
            builder.store(narrowed(builder, values, TARGET), at, align=2)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


@intrinsic  # type: ignore[untyped-decorator]
def add_scaled(typingctx: Any, target: Any, change: Any, scale: Any, lanes: Any) -> Any:
    """target += scale * change: addresses of bfloat16 and of float32, `lanes` of them, a multiple of 16."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        target, change, scale, lanes = args
        one = builder.insert_element(ir.Constant(SUMS, ir.Undefined), scale, ir.Constant(I32, 0))
        scales = builder.shuffle_vector(one, one, ir.Constant(_LONGS, [0] * LANES))
        with cgutils.for_range_slice(builder, ir.Constant(I64, 0), lanes, ir.Constant(I64, LANES), I64) as (
            lane,
            _,
        ):
            values = builder.load(place(builder, change, builder.mul(lane, ir.Constant(I64, 4)), SUMS), align=4)
            at = place(builder, target, builder.mul(lane, ir.Constant(I64, 2)), _WORDS)
            wide = builder.shl(builder.zext(builder.load(at, align=2), _LONGS), _SHIFT)
            total = builder.fadd(builder.bitcast(wide, SUMS), builder.fmul(scales, values))
            builder.store(narrowed(builder, total, TARGET), at, align=2)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.float32, types.int64), codegen


def pair_tile(
    rows: int,
    groups: int,
    unroll: int,
    *,
    paired: bool,
    accumulate: bool = False,
    target: Target = TARGET,
) -> Callable[..., None]:
    """Make `tile(c, c_stride, a, a_stride, b, b_stride, second, pairs, ahead)`: C = A B, or C += with `accumulate`.

    All int64. Addresses: C [rows, groups * 16] float32, A [rows, 2 * pairs] bfloat16, strides in elements. B in
    bfloat16 is `paired` [pairs, groups * 16, 2], or it is [2 * pairs, groups * 16]; `b_stride` is from one pair to
    the next, in elements, and `second` from the first row of such a pair to its second.

    `unroll` sets how many partial sums a lane keeps (pair p goes to sum p mod unroll, what is left over to the
    first; they are added in order at the end), so tiles that must agree bit for bit need the same `unroll`. What
    lies `ahead` bytes after each part of B that is read is brought into the cache on the way: the B that is needed
    next.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        c, c_stride, a, a_stride, b, b_stride, second, pairs, ahead = args

        def const(value: int) -> Any:
            return ir.Constant(I64, value)

        fetch = declare(builder, "llvm.prefetch.p0", ir.VoidType(), I8.as_pointer(), I32, I32, I32)
        hints = [ir.Constant(I32, value) for value in (0, 2, 1)]  # to read, into the second-level cache, data
        whole = builder.sub(pairs, builder.urem(pairs, const(unroll)))

        def load_b(start: Any, group: int, *, bring: bool) -> tuple[Any, ...]:
            """Pairs [LANES] as factors."""
            addresses = [builder.add(start, const((4 if paired else 2) * LANES * group))]
            if not paired:
                addresses.append(builder.add(addresses[0], builder.mul(second, const(2))))
            if bring and (paired or group % 2 == 0):  # two groups are one line of the cache
                for address in addresses:
                    builder.call(fetch, [place(builder, address, ahead, I8), *hints])
            if paired:
                return factors(
                    builder, builder.load(place(builder, addresses[0], const(0), _LONGS), align=2), target
                )
            both = [builder.load(place(builder, address, const(0), _WORDS), align=2) for address in addresses]
            if target.pairs:
                order = ir.Constant(ir.VectorType(I32, 2 * LANES), _INTERLEAVED)
                return (builder.bitcast(builder.shuffle_vector(*both, order), PAIRS),)
            wide = [builder.shl(builder.zext(half, _LONGS), _SHIFT) for half in both]
            return tuple(builder.bitcast(half, SUMS) for half in wide)

        def compute(some_rows: range, some_groups: range) -> None:
            """The cells of C in these rows and groups."""
            cells = [(row, group) for row in some_rows for group in some_groups]
            sums = {(cell, k): cgutils.alloca_once(builder, SUMS) for cell in cells for k in range(unroll)}
            for slot in sums.values():
                builder.store(ir.Constant(SUMS, [0.0] * LANES), slot)

            def multiply(pair: Any, k: int) -> None:
                start = builder.add(b, builder.mul(builder.mul(pair, b_stride), const(2)))
                right = {group: load_b(start, group, bring=0 in some_rows) for group in some_groups}
                for row in some_rows:
                    offset = builder.add(builder.mul(a_stride, const(2 * row)), builder.mul(pair, const(4)))
                    left = factors(
                        builder, spread(builder, builder.load(place(builder, a, offset, I32), align=2)), target
                    )
                    for group in some_groups:
                        slot = sums[(row, group), k]
                        builder.store(add_products(builder, builder.load(slot), left, right[group]), slot)

            with cgutils.for_range_slice(builder, const(0), whole, const(unroll), I64) as (step, _):
                for k in range(unroll):
                    multiply(builder.add(step, const(k)), k)
            if unroll > 1:
                with cgutils.for_range_slice(builder, whole, pairs, const(1), I64) as (pair, _):
                    multiply(pair, 0)

            for row, group in cells:
                total = builder.load(sums[(row, group), 0])
                for k in range(1, unroll):
                    total = builder.fadd(total, builder.load(sums[(row, group), k]))
                offset = builder.mul(builder.add(builder.mul(c_stride, const(row)), const(group * LANES)), const(4))
                at = place(builder, c, offset, SUMS)
                if accumulate:
                    total = builder.fadd(builder.load(at, align=4), total)
                builder.store(total, at, align=4)

        for some_rows, some_groups in parts(rows, groups, unroll, target):
            compute(some_rows, some_groups)
        return context.get_dummy_value()

    @intrinsic  # type: ignore[untyped-decorator]
    def tile(
        typingctx: Any, c: Any, c_stride: Any, a: Any, a_stride: Any, b: Any, b_stride: Any, second: Any,
        pairs: Any, ahead: Any,
    ) -> Any:  # fmt: skip
        return types.void(*([types.int64] * 9)), codegen

    made: Callable[..., None] = tile
    return made
