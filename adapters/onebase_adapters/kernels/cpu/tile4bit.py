"""A tile of a product with packed 4-bit weights, multiplied by AVX-512 BF16 in pairs; emitted as LLVM vectors.

bitsandbytes packs 32 output features together: for each pair of inputs there are 32 bytes, whose low halves are the
codes of the first 16 features (both inputs of one, then of the next), whose high halves are those of the other 16.
A byte widened to 16 bits is an index into a table of 32 entries, since the permutation reads five bits only and the
table holds the 16 codes twice: no masks, one shift, one look-up for 32 weights.

Invariant: a row is summed pair by pair within a block of one scale, and block by block, in the same order in tiles
of any size. It is the order of bitsandbytes' own product, so that the results are the same to the bit.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from onebase_adapters.kernels.cpu.vector import F32, I8, I16, I32, I64

FEATURES = 32
"""Output features that are packed together, and a tile's columns."""
UNROLL = 4
"""Pairs of inputs a turn of the loop: 8 inputs."""
_AHEAD = 2048
"""Bytes between the weights that are read and those that are being fetched."""


class _BFloat(ir.Type):  # type: ignore[misc]
    """LLVM's bfloat, which llvmlite has no name for."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


_SUMS = ir.VectorType(F32, 16)
_PAIRS = ir.VectorType(_BFloat(), 32)
_WORDS = ir.VectorType(I16, 32)
_LONGS = ir.VectorType(I32, 16)


def packed_tile(rows: int) -> Callable[..., None]:
    """Make `tile(y, y_stride, x, x_stride, weight, scales, scale_stride, blocks, pairs, codes)`: y = x W^T.

    All int64. Addresses: x [rows, in] and y [rows, 32] bfloat16 with strides in elements; `weight` [in / 2, 32]
    bytes as above; `scales` [blocks, 32] bfloat16 with its stride, one for each feature and block of 2 * `pairs`
    inputs (`pairs` a multiple of `UNROLL`); `codes` [32] bfloat16, the 16 values twice.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        y, y_stride, x, x_stride, weight, scales, scale_stride, blocks, pairs, codes = args

        def function(name: str, result: Any, *arguments: Any) -> Any:
            return cgutils.get_or_insert_function(builder.module, ir.FunctionType(result, arguments), name)

        def at(base: Any, offset: Any, kind: Any) -> Any:
            return builder.inttoptr(builder.add(base, offset), kind.as_pointer())

        def times(value: Any, factor: int) -> Any:
            return builder.mul(value, ir.Constant(I64, factor))

        dot = function("llvm.x86.avx512bf16.dpbf16ps.512", _SUMS, _SUMS, _PAIRS, _PAIRS)
        look_up = function("llvm.x86.avx512.permvar.hi.512", _WORDS, _WORDS, _WORDS)
        narrow = function("llvm.x86.avx512bf16.cvtne2ps2bf16.512", _PAIRS, _SUMS, _SUMS)
        fma = function("llvm.fma.v16f32", _SUMS, _SUMS, _SUMS, _SUMS)
        fetch = function("llvm.prefetch.p0", ir.VoidType(), I8.as_pointer(), I32, I32, I32)
        hints = [ir.Constant(I32, value) for value in (0, 3, 1)]  # to read, into the first-level cache, data
        none = ir.Constant(I64, 0)
        zeros = ir.Constant(_SUMS, [0.0] * 16)
        table = builder.load(at(codes, none, _WORDS), align=2)
        cells = [(row, half) for row in range(rows) for half in range(2)]
        sums = {cell: cgutils.alloca_once(builder, _SUMS) for cell in cells}
        totals = {cell: cgutils.alloca_once(builder, _SUMS) for cell in cells}
        for cell in cells:
            builder.store(zeros, totals[cell])

        def multiply(pair: Any, *, new_line: bool) -> None:
            """Add the products of one pair of inputs to the sums."""
            place = builder.add(weight, times(pair, FEATURES))
            if new_line:
                builder.call(fetch, [at(place, ir.Constant(I64, _AHEAD), I8), *hints])
            packed = builder.load(at(place, none, ir.VectorType(I8, FEATURES)), align=1)
            low = builder.zext(packed, _WORDS)
            high = builder.lshr(low, ir.Constant(_WORDS, [4] * 32))
            halves = [builder.bitcast(builder.call(look_up, [table, index]), _PAIRS) for index in (low, high)]
            for row in range(rows):
                offset = times(builder.add(builder.mul(x_stride, ir.Constant(I64, row)), times(pair, 2)), 2)
                both = builder.load(at(x, offset, I32), align=2)
                one = builder.insert_element(ir.Constant(_LONGS, ir.Undefined), both, ir.Constant(I32, 0))
                spread = builder.shuffle_vector(one, one, ir.Constant(_LONGS, [0] * 16))
                for half in range(2):
                    place = sums[row, half]
                    inputs = [builder.load(place), builder.bitcast(spread, _PAIRS), halves[half]]
                    builder.store(builder.call(dot, inputs), place)

        with cgutils.for_range_slice(builder, none, blocks, ir.Constant(I64, 1), I64) as (block, _):
            for cell in cells:
                builder.store(zeros, sums[cell])
            first = builder.mul(block, pairs)
            with cgutils.for_range_slice(builder, none, pairs, ir.Constant(I64, UNROLL), I64) as (step, _):
                for k in range(UNROLL):
                    pair = builder.add(builder.add(first, step), ir.Constant(I64, k))
                    multiply(pair, new_line=k % 2 == 0)
            for half in range(2):
                offset = builder.add(times(builder.mul(block, scale_stride), 2), ir.Constant(I64, 32 * half))
                bits = builder.load(at(scales, offset, ir.VectorType(I16, 16)), align=2)
                wide = builder.shl(builder.zext(bits, _LONGS), ir.Constant(_LONGS, [16] * 16))
                scale = builder.bitcast(wide, _SUMS)
                for row in range(rows):
                    total = totals[row, half]
                    inputs = [builder.load(sums[row, half]), scale, builder.load(total)]
                    builder.store(builder.call(fma, inputs), total)

        for row in range(rows):
            result = builder.call(narrow, [builder.load(totals[row, 1]), builder.load(totals[row, 0])])
            builder.store(result, at(y, times(builder.mul(y_stride, ir.Constant(I64, row)), 2), _PAIRS), align=2)
        return context.get_dummy_value()

    @intrinsic  # type: ignore[untyped-decorator]
    def tile(
        typingctx: Any, y: Any, y_stride: Any, x: Any, x_stride: Any, weight: Any, scales: Any, scale_stride: Any,
        blocks: Any, pairs: Any, codes: Any,
    ) -> Any:  # fmt: skip
        return types.void(*([types.int64] * 10)), codegen

    made: Callable[..., None] = tile
    return made
