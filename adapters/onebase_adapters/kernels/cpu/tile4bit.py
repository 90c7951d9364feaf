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

from onebase_adapters.kernels.cpu.pairs import PAIRS, SUMS, add_products, declare, place, spread
from onebase_adapters.kernels.cpu.vector import I8, I16, I32, I64

FEATURES = 32
"""Output features that are packed together, and a tile's columns."""
UNROLL = 4
"""Pairs of inputs a turn of the loop: 8 inputs."""
_AHEAD = 2048
"""Bytes between the weights that are read and those that are being fetched."""


_WORDS = ir.VectorType(I16, 32)
_LONGS = ir.VectorType(I32, 16)


def packed_tile(rows: int) -> Callable[..., None]:
    """Make `tile(y, y_stride, x, x_stride, weight, scales, scale_stride, blocks, pairs, codes, wanted, size)`.

    y = x W^T; all int64. Addresses: x [rows, in] and y [rows, 32] bfloat16 with strides in elements; `weight` [in /
    2, 32] bytes as above; `scales` [blocks, 32] bfloat16 with its stride, one for each feature and block of 2 *
    `pairs` inputs (`pairs` a multiple of `UNROLL`); `codes` [32] bfloat16, the 16 values twice. On the way the
    `size` bytes at `wanted` are brought into the cache, a line with each pair: multiplying leaves memory idle.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        y, y_stride, x, x_stride, weight, scales, scale_stride, blocks, pairs, codes, wanted, size = args

        def times(value: Any, factor: int) -> Any:
            return builder.mul(value, ir.Constant(I64, factor))

        look_up = declare(builder, "llvm.x86.avx512.permvar.hi.512", _WORDS, _WORDS, _WORDS)
        narrow = declare(builder, "llvm.x86.avx512bf16.cvtne2ps2bf16.512", PAIRS, SUMS, SUMS)
        fma = declare(builder, "llvm.fma.v16f32", SUMS, SUMS, SUMS, SUMS)
        fetch = declare(builder, "llvm.prefetch.p0", ir.VoidType(), I8.as_pointer(), I32, I32, I32)
        hints = [ir.Constant(I32, value) for value in (0, 3, 1)]  # to read, into the first-level cache, data
        none = ir.Constant(I64, 0)
        zeros = ir.Constant(SUMS, [0.0] * 16)
        table = builder.load(place(builder, codes, none, _WORDS), align=2)
        cells = [(row, half) for row in range(rows) for half in range(2)]
        sums = {cell: cgutils.alloca_once(builder, SUMS) for cell in cells}
        totals = {cell: cgutils.alloca_once(builder, SUMS) for cell in cells}
        for cell in cells:
            builder.store(zeros, totals[cell])

        def multiply(pair: Any, *, new_line: bool) -> None:
            """Add the products of one pair of inputs to the sums."""
            address = builder.add(weight, times(pair, FEATURES))
            if new_line:
                builder.call(fetch, [place(builder, address, ir.Constant(I64, _AHEAD), I8), *hints])
            line = times(pair, 64)
            offset = builder.select(builder.icmp_unsigned("<", line, size), line, size)
            builder.call(fetch, [place(builder, wanted, offset, I8), *hints])
            packed = builder.load(place(builder, address, none, ir.VectorType(I8, FEATURES)), align=1)
            low = builder.zext(packed, _WORDS)
            high = builder.lshr(low, ir.Constant(_WORDS, [4] * 32))
            halves = [builder.call(look_up, [table, index]) for index in (low, high)]
            for row in range(rows):
                offset = times(builder.add(builder.mul(x_stride, ir.Constant(I64, row)), times(pair, 2)), 2)
                inputs = spread(builder, builder.load(place(builder, x, offset, I32), align=2))
                for half in range(2):
                    slot = sums[row, half]
                    builder.store(add_products(builder, builder.load(slot), inputs, halves[half]), slot)

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
                bits = builder.load(place(builder, scales, offset, ir.VectorType(I16, 16)), align=2)
                wide = builder.shl(builder.zext(bits, _LONGS), ir.Constant(_LONGS, [16] * 16))
                scale = builder.bitcast(wide, SUMS)
                for row in range(rows):
                    total = totals[row, half]
                    inputs = [builder.load(sums[row, half]), scale, builder.load(total)]
                    builder.store(builder.call(fma, inputs), total)

        for row in range(rows):
            result = builder.call(narrow, [builder.load(totals[row, 1]), builder.load(totals[row, 0])])
            builder.store(
                result, place(builder, y, times(builder.mul(y_stride, ir.Constant(I64, row)), 2), PAIRS), align=2
            )
        return context.get_dummy_value()

    @intrinsic  # type: ignore[untyped-decorator]
    def tile(
        typingctx: Any, y: Any, y_stride: Any, x: Any, x_stride: Any, weight: Any, scales: Any, scale_stride: Any,
        blocks: Any, pairs: Any, codes: Any, wanted: Any, size: Any,
    ) -> Any:  # fmt: skip
        return types.void(*([types.int64] * 12)), codegen

    made: Callable[..., None] = tile
    return made
