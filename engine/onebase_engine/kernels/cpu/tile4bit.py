"""A tile of a product with packed weights of 4 or 8 bits, emitted as LLVM vectors.

A weight is the value of its code, times its block's scale, plus its block's offset if there are any: NF4, FP4, AWQ,
GPTQ and GGUF's kinds differ in the 16 values, the size of a block, and the `Form` of scales and offsets. Offsets
cost little: a block's inputs are summed once for all features, and what its products are added to begins with it.

bitsandbytes packs 32 output features together: for each pair of inputs there are 32 bytes, whose low halves are the
codes of the first 16 features (both inputs of one, then of the next), whose high halves are those of the other 16.
With AVX-512, a byte widened to 16 bits is an index into a table of 32 entries, since the permutation reads five
bits only and the table holds the 16 codes twice: no masks, one shift, one look-up for 32 weights. Elsewhere the
lower and the upper bytes of the codes' values are looked up apart and interleaved.

Invariant: a row is summed pair by pair within a block of one scale, and block by block, in the same order in tiles
of any size. With AVX-512 BF16 it is the order of bitsandbytes' own product: the results are the same to the bit.
"""

from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from onebase_engine.kernels.cpu.pairs import (
    PAIRS,
    SUMS,
    add_products,
    declare,
    factors,
    narrowed,
    parts,
    place,
    spread,
)
from onebase_engine.kernels.cpu.target import TARGET, Target
from onebase_engine.kernels.cpu.vector import I8, I16, I32, I64


class Form(NamedTuple):
    """How a weight's scales, and offsets if it has any, lie in memory."""

    scales: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    offsets: Literal["", "steps", "added"] = ""
    """None; int8, in steps of the scale, as zero points are; or to be added, of the scales' kind."""
    codes: Literal["nibbles", "int8", "float8"] = "nibbles"
    """Numbers of 8 bits are their own values: for each pair of inputs two bytes of each feature, side by side."""

    @property
    def wide(self) -> bool:
        """Whether a code takes a byte."""
        return self.codes != "nibbles"

    @property
    def size(self) -> int:
        """Bytes of a scale."""
        return 4 if self.scales == "float32" else 2

    @property
    def size_of_pair(self) -> int:
        """Bytes of a pair of inputs for all features of a tile."""
        return 2 * FEATURES if self.wide else FEATURES

    @property
    def size_of_offset(self) -> int:
        """Bytes of an offset."""
        return 1 if self.offsets == "steps" else self.size


_PLAIN_FORM = Form()

FEATURES = 32
"""Output features that are packed together, and a tile's columns."""
UNROLL = 4
"""Pairs of inputs a turn of the loop: 8 inputs."""
_FLOAT8 = 256.0
"""How much larger a float8 is than the float16 of the same fields."""
_AHEAD = 2048
"""Bytes between the weights that are read and those that are being fetched."""

_BYTES = ir.VectorType(I8, 32)
_WORDS = ir.VectorType(I16, 32)
_LONGS = ir.VectorType(I32, 16)
_INTERLEAVED = [
    at + which
    for part in (0, 8)
    for lane in (0, 16)
    for at in range(lane + part, lane + part + 8)
    for which in (0, 32)
]
"""Places of 32 lower and 32 upper bytes, within 16 and 16 as processors interleave them."""
_QUARTERS = [4 * quarter + at for quarter in (0, 2, 1, 3) for at in range(4)]


def _table(builder: Any, codes: Any, target: Target) -> Callable[[Any, int], Any]:
    """`look_up(packed, half)`: the pairs [16] of the features in the lower or the upper half of `packed` [32]
    bytes, by the values `codes` [32] words. Where bytes are looked up, features are in the order of `_sorted`."""

    def words(packed: Any, half: int) -> Any:
        permute = declare(builder, "llvm.x86.avx512.permvar.hi.512", _WORDS, _WORDS, _WORDS)
        index = builder.zext(packed, _WORDS)
        if half:
            index = builder.lshr(index, ir.Constant(_WORDS, [4] * 32))
        return builder.bitcast(builder.call(permute, [codes, index]), _LONGS)

    if target.words:
        return words
    if target.look_up is None:
        raise NotImplementedError(f"No look-up of 4-bit codes on {target.name}.")
    name, size = target.look_up
    some = ir.VectorType(I8, size)
    halves = [builder.lshr(codes, ir.Constant(_WORDS, [shift] * 32)) for shift in (0, 8)]
    tables = [_picked(builder, builder.trunc(half, _BYTES), range(size)) for half in halves]

    def bytewise(packed: Any, half: int) -> Any:
        find = declare(builder, name, some, some, some)
        fours = ir.Constant(_BYTES, [4] * 32)
        index = builder.lshr(packed, fours) if half else builder.and_(packed, ir.Constant(_BYTES, [15] * 32))
        found = [
            builder.call(find, [table, _picked(builder, index, range(first, first + size))])
            for first in range(0, 32, size)
            for table in tables
        ]
        low, high = found if len(found) == 2 else [_joined(builder, *found[at::2]) for at in range(2)]
        return builder.bitcast(_joined(builder, low, high, _INTERLEAVED), _LONGS)

    return bytewise


def _picked(builder: Any, values: Any, places: Iterable[int]) -> Any:
    """The numbers of a vector at these places."""
    return _joined(builder, values, values, places)


def _joined(builder: Any, first: Any, second: Any, places: Iterable[int] = range(32)) -> Any:
    """The numbers of two vectors, one after the other, at these places."""
    mask = list(places)
    return builder.shuffle_vector(first, second, ir.Constant(ir.VectorType(I32, len(mask)), mask))


def _sorted(builder: Any, values: Any, target: Target, form: Form) -> Any:
    """[16] features from their own order to that of `_table`, or back: swapping the middle quarters is its own
    inverse."""
    return values if target.words or form.wide else _picked(builder, values, _QUARTERS)


def _wide(builder: Any, base: Any, offset: Any, form: Form) -> Any:
    """[16] scales at an address, as float32."""
    if form.scales == "float32":
        return builder.load(place(builder, base, offset, SUMS), align=4)
    if form.scales == "float16":
        halves = ir.VectorType(ir.HalfType(), 16)
        return builder.fpext(builder.load(place(builder, base, offset, halves), align=2), SUMS)
    bits = builder.load(place(builder, base, offset, ir.VectorType(I16, 16)), align=2)
    return builder.bitcast(builder.shl(builder.zext(bits, _LONGS), ir.Constant(_LONGS, [16] * 16)), SUMS)


def _numbers(builder: Any, packed: Any, target: Target, form: Form) -> tuple[Any, ...]:
    """`factors` of 16 pairs of int8 [32], or of float8 as multiples of `_FLOAT8`: bfloat16 holds them exactly."""
    shift = ir.Constant(_LONGS, [16] * 16)
    if form.codes == "int8":
        pairs = builder.bitcast(builder.sext(packed, _WORDS), _LONGS)
        first = builder.sitofp(builder.ashr(builder.shl(pairs, shift), shift), SUMS)
        second = builder.sitofp(builder.ashr(pairs, shift), SUMS)
    else:
        halves = builder.bitcast(_halves(builder, builder.zext(packed, _WORDS)), ir.VectorType(ir.HalfType(), 32))
        first, second = (
            builder.fpext(_joined(builder, halves, halves, range(which, 32, 2)), SUMS) for which in (0, 1)
        )
    if not target.pairs:
        return first, second
    low = builder.lshr(builder.bitcast(first, _LONGS), shift)
    return (builder.bitcast(builder.or_(low, builder.bitcast(second, _LONGS)), PAIRS),)


def _halves(builder: Any, words: Any) -> Any:
    """Bits of float8_e4m3fn [32] in words as those of float16: the same fields, under an exponent whose bias is 8
    more. What is subnormal stays so, and processors widen it as quickly as any other."""

    def constant(value: int) -> Any:
        return ir.Constant(_WORDS, [value] * 32)

    sign = builder.shl(builder.and_(words, constant(0x80)), constant(8))
    return builder.or_(sign, builder.shl(builder.and_(words, constant(0x7F)), constant(7)))


def packed_tile(rows: int, target: Target = TARGET, form: Form = _PLAIN_FORM) -> Callable[..., None]:
    """Make `tile(y, y_stride, x, x_stride, weight, scales, offsets, scale_stride, sums, blocks, pairs, codes,
    wanted, size)`.

    y = x W^T; all int64. Addresses: x [rows, in] and y [rows, 32] bfloat16 with strides in elements; `weight` [in /
    2, 32] bytes as above; `scales` and `offsets` [blocks, 32] with their stride, as `form` has them, one for each
    feature and block of 2 * `pairs` inputs (`pairs` a multiple of `UNROLL`); `sums` [rows, blocks] float32, each
    block's sum of inputs, for offsets; `codes` [32] bfloat16, the 16 values twice. On the way the `size` bytes at
    `wanted` are brought into the cache, a line with each pair: multiplying leaves memory idle.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        y, y_stride, x, x_stride, weight, scales, offsets, scale_stride, x_sums, blocks, pairs = args[:11]
        codes, wanted, size = args[11:]

        def times(value: Any, factor: int) -> Any:
            return builder.mul(value, ir.Constant(I64, factor))

        fma = declare(builder, "llvm.fma.v16f32", SUMS, SUMS, SUMS, SUMS)
        fetch = declare(builder, "llvm.prefetch.p0", ir.VoidType(), I8.as_pointer(), I32, I32, I32)
        hints = [ir.Constant(I32, value) for value in (0, 3, 1)]  # to read, into the first-level cache, data
        none = ir.Constant(I64, 0)
        zeros = ir.Constant(SUMS, [0.0] * 16)
        look_up = None
        if not form.wide:
            look_up = _table(builder, builder.load(place(builder, codes, none, _WORDS), align=2), target)

        def first_of(block: Any, half: int) -> Any:
            """The place of a half's first scale."""
            return builder.add(builder.mul(block, scale_stride), ir.Constant(I64, 16 * half))

        def summed(row: int, block: Any) -> Any:
            """A block's sum of inputs, in all lanes."""
            number = builder.add(builder.mul(blocks, ir.Constant(I64, row)), block)
            bits = builder.load(place(builder, x_sums, times(number, 4), I32), align=4)
            return builder.bitcast(spread(builder, bits), SUMS)

        def compute(some_rows: range, halves: range) -> None:
            """The cells of y in these rows and halves."""
            cells = [(row, half) for row in some_rows for half in halves]
            sums = {cell: cgutils.alloca_once(builder, SUMS) for cell in cells}
            totals = {cell: cgutils.alloca_once(builder, SUMS) for cell in cells}
            for cell in cells:
                builder.store(zeros, totals[cell])

            def start(block: Any, half: int) -> None:
                """Let the sums of a block begin with what its inputs' sum makes of the steps, or with nothing."""
                if form.offsets == "steps":
                    some = ir.VectorType(I8, 16)
                    steps = builder.load(place(builder, offsets, first_of(block, half), some), align=1)
                    steps = _sorted(builder, builder.sitofp(builder.sext(steps, _LONGS), SUMS), target, form)
                for row in some_rows:
                    begun = builder.fmul(summed(row, block), steps) if form.offsets == "steps" else zeros
                    builder.store(begun, sums[row, half])

            def multiply(pair: Any, *, new_line: bool) -> None:
                """Add the products of one pair of inputs to the sums."""
                address = builder.add(weight, times(pair, form.size_of_pair))
                if (0, 0) in cells:
                    if new_line or form.wide:
                        builder.call(fetch, [place(builder, address, ir.Constant(I64, _AHEAD), I8), *hints])
                    line = times(pair, 64)
                    offset = builder.select(builder.icmp_unsigned("<", line, size), line, size)
                    builder.call(fetch, [place(builder, wanted, offset, I8), *hints])
                if look_up is None:
                    some = {half: place(builder, address, ir.Constant(I64, 32 * half), _BYTES) for half in halves}
                    weights = {
                        half: _numbers(builder, builder.load(at, align=1), target, form)
                        for half, at in some.items()
                    }
                else:
                    packed = builder.load(place(builder, address, none, _BYTES), align=1)
                    weights = {half: factors(builder, look_up(packed, half), target) for half in halves}
                for row in some_rows:
                    offset = times(builder.add(builder.mul(x_stride, ir.Constant(I64, row)), times(pair, 2)), 2)
                    inputs = factors(
                        builder, spread(builder, builder.load(place(builder, x, offset, I32), align=2)), target
                    )
                    for half in halves:
                        slot = sums[row, half]
                        builder.store(add_products(builder, builder.load(slot), inputs, weights[half]), slot)

            with cgutils.for_range_slice(builder, none, blocks, ir.Constant(I64, 1), I64) as (block, _):
                for half in halves:
                    start(block, half)
                first = builder.mul(block, pairs)
                with cgutils.for_range_slice(builder, none, pairs, ir.Constant(I64, UNROLL), I64) as (step, _):
                    for k in range(UNROLL):
                        pair = builder.add(builder.add(first, step), ir.Constant(I64, k))
                        multiply(pair, new_line=k % 2 == 0)
                for half in halves:
                    at = times(first_of(block, half), form.size)
                    scale = _sorted(builder, _wide(builder, scales, at, form), target, form)
                    if form.codes == "float8":
                        scale = builder.fmul(scale, ir.Constant(SUMS, [_FLOAT8] * 16))
                    if form.offsets == "added":
                        offset = _sorted(builder, _wide(builder, offsets, at, form), target, form)
                    for row in some_rows:
                        total = builder.load(totals[row, half])
                        total = builder.call(fma, [builder.load(sums[row, half]), scale, total])
                        if form.offsets == "added":
                            total = builder.call(fma, [summed(row, block), offset, total])
                        builder.store(total, totals[row, half])

            for row, half in cells:
                result = narrowed(builder, _sorted(builder, builder.load(totals[row, half]), target, form), target)
                offset = builder.add(
                    times(builder.mul(y_stride, ir.Constant(I64, row)), 2), ir.Constant(I64, 32 * half)
                )
                builder.store(result, place(builder, y, offset, result.type), align=2)

        for some_rows, halves in parts(rows, 2, 1, target):
            compute(some_rows, halves)
        return context.get_dummy_value()

    @intrinsic  # type: ignore[untyped-decorator]
    def tile(
        typingctx: Any, y: Any, y_stride: Any, x: Any, x_stride: Any, weight: Any, scales: Any, offsets: Any,
        scale_stride: Any, sums: Any, blocks: Any, pairs: Any, codes: Any, wanted: Any, size: Any,
    ) -> Any:  # fmt: skip
        return types.void(*([types.int64] * 14)), codegen

    made: Callable[..., None] = tile
    return made
