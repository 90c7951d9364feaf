"""The product with 4-bit weights on GPUs, and several weights that share an input as one.

A program takes some output features and unpacks their weights in registers, to the bits of bitsandbytes' own
expansion (a code's value times its block's scale, rounded to bfloat16), so that of a weight half a byte is read,
once for all rows. What the 16 codes of a block stand for is computed once, and looked up by permuting bytes. As the
left operand of a tensor core's product weights fill it with few rows, too.

Invariant: a row's sums do not depend on how many rows there are. Each is summed in the same steps over the input,
which is cut in splits by the weight's size alone, and splits are added up in order.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import nn

from onebase_engine.kernels.bitsandbytes_import import Linear4bit, dequantize_blockwise
from onebase_engine.kernels.cuda.operand import INTERPRETED, OPERAND

_BLOCK = 64
"""Weights of one scale."""
_SHAPES = {16: (64, 2, 4), 32: (128, 2, 8), 64: (64, 2, 4), 128: (64, 2, 4)}
"""By the rows of one program: its output features (of which Hopper's tensor cores take 64 at least), the blocks of
each feature in one step, and its warps."""
_STEP = 4
"""Blocks of which splits are made: more than a step's."""
_PROGRAMS = 768
"""Programs that a large GPU runs at a time, each of 64 features or more where the input is long enough."""
_COLUMNS = 1024


def _table() -> str:
    """PTX: what a block's 16 codes stand for in bfloat16, the low bytes of four of them in each of $0 to $3, their
    high bytes in $4 to $7; from the block's scale ($8) and the codes' values ($9 to $24)."""
    lines = ["{ .reg .f32 first, second; .reg .b32 pair<8>;"]
    for pair in range(8):
        lines += [
            f"mul.rn.f32 first, $8, ${9 + 2 * pair};",
            f"mul.rn.f32 second, $8, ${10 + 2 * pair};",
            f"cvt.rn.bf16x2.f32 pair{pair}, second, first;",
        ]
    for four in range(4):
        pairs = f"pair{2 * four}, pair{2 * four + 1}"
        lines += [f"prmt.b32 ${four}, {pairs}, 0x6420;", f"prmt.b32 ${4 + four}, {pairs}, 0x7531;"]
    return "\n".join([*lines, "}"])


def _lookup() -> str:
    """PTX: eight bfloat16 ($0 to $7) for a word of eight codes ($8), the first in the high half of the lowest byte,
    and a table as `_table` has it ($9 to $16)."""
    lines = [
        "{ .reg .b32 which, side, full, below, above, low, high, two;",
        # Each entry's number among eight, and whether it is one of the upper eight.
        "and.b32 which, $8, 0x77777777;",
        "shr.b32 side, $8, 3;",
        "and.b32 side, side, 0x11111111;",
    ]
    for half in (0, 4):
        first, second, third, fourth = (f"${half + place}" for place in range(4))
        if half:
            lines += ["shr.b32 which, which, 16;", "shr.b32 side, side, 16;"]
        lines += [
            "prmt.b32 full, 0xFF00, 0, side;",
            "prmt.b32 below, $9, $10, which;",
            "prmt.b32 above, $11, $12, which;",
            "lop3.b32 low, below, above, full, 0xD8;",  # full ? above : below
            "prmt.b32 below, $13, $14, which;",
            "prmt.b32 above, $15, $16, which;",
            "lop3.b32 high, below, above, full, 0xD8;",
            "prmt.b32 two, low, high, 0x4051;",
            f"mov.b32 {{{first}, {second}}}, two;",
            "prmt.b32 two, low, high, 0x6273;",
            f"mov.b32 {{{third}, {fourth}}}, two;",
        ]
    return "\n".join([*lines, "}"])


_TABLE, _TABLE_OPERANDS = tl.constexpr(_table()), tl.constexpr(",".join(["=r"] * 8 + ["f"] * 17))
_LOOKUP, _LOOKUP_OPERANDS = tl.constexpr(_lookup()), tl.constexpr(",".join(["=h"] * 8 + ["r"] * 9))


@triton.jit  # type: ignore[untyped-decorator]
def _one(words: tl.tensor, scale: tl.tensor, codes: tl.tensor, SHIFT: tl.constexpr) -> tl.tensor:
    return tl.load(codes + ((words >> SHIFT) & 15)) * scale[:, :, None]


@triton.jit  # type: ignore[untyped-decorator]
def _unpack(words: tl.tensor, scale: tl.tensor, codes: tl.tensor, INTERPRETED: tl.constexpr) -> tl.tensor:
    """The weights of words [features, blocks, 8] with the blocks' scales [features, blocks]: [features, blocks, 8,
    2, 2, 2]. The interpreter, which knows no PTX, and whose bfloat16 is cut off, makes them in float32."""
    if INTERPRETED:
        a, b = _one(words, scale, codes, 4), _one(words, scale, codes, 0)
        c, d = _one(words, scale, codes, 12), _one(words, scale, codes, 8)
        e, f = _one(words, scale, codes, 20), _one(words, scale, codes, 16)
        g, h = _one(words, scale, codes, 28), _one(words, scale, codes, 24)
    else:
        l0, l1, l2, l3, h0, h1, h2, h3 = tl.inline_asm_elementwise(
            _TABLE,
            _TABLE_OPERANDS,
            [
                scale,
                tl.load(codes), tl.load(codes + 1), tl.load(codes + 2), tl.load(codes + 3),
                tl.load(codes + 4), tl.load(codes + 5), tl.load(codes + 6), tl.load(codes + 7),
                tl.load(codes + 8), tl.load(codes + 9), tl.load(codes + 10), tl.load(codes + 11),
                tl.load(codes + 12), tl.load(codes + 13), tl.load(codes + 14), tl.load(codes + 15),
            ],
            dtype=(tl.int32,) * 8,
            is_pure=True,
            pack=1,
        )  # fmt: skip
        a, b, c, d, e, f, g, h = tl.inline_asm_elementwise(
            _LOOKUP,
            _LOOKUP_OPERANDS,
            [
                words, l0[:, :, None], l1[:, :, None], l2[:, :, None], l3[:, :, None],
                h0[:, :, None], h1[:, :, None], h2[:, :, None], h3[:, :, None],
            ],
            dtype=(tl.bfloat16,) * 8,
            is_pure=True,
            pack=1,
        )  # fmt: skip
    return tl.join(tl.join(tl.join(a, e), tl.join(c, g)), tl.join(tl.join(b, f), tl.join(d, h)))


@triton.jit(do_not_specialize=["rows", "split"])  # type: ignore[untyped-decorator]
def _multiply(
    x: tl.tensor,
    out: tl.tensor,
    weight: tl.tensor,
    scales: tl.tensor,
    codes: tl.tensor,
    rows: tl.tensor,
    features: tl.tensor,
    blocks: tl.tensor,
    split: tl.tensor,
    ROWS: tl.constexpr,
    FEATURES: tl.constexpr,
    BLOCKS: tl.constexpr,
    OPERAND: tl.constexpr,
    INTERPRETED: tl.constexpr,
) -> None:
    """out[split, row, feature] = sum over the split of x W^T: program (features, split, rows).

    `weight`: words of eight codes, eight words a block; `blocks`: of a feature, of which `split` make a split,
    BLOCKS a step.
    """
    feature = tl.program_id(0) * FEATURES + tl.arange(0, FEATURES)
    row = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    start = tl.program_id(1) * split
    end = tl.minimum(start + split, blocks)
    block = tl.arange(0, BLOCKS)
    of_feature = (feature.to(tl.int64) * blocks)[:, None] + block[None, :]
    word = of_feature[:, :, None] * 8 + tl.arange(0, 8)[None, None, :]
    column = tl.arange(0, BLOCKS * 64)
    of_row = (row.to(tl.int64) * blocks * 64)[:, None] + column[None, :]
    sums = tl.zeros((FEATURES, ROWS), tl.float32)
    inside = (start + block < end)[None, :] & (feature < features)[:, None]
    words = tl.load(weight + word + start * 8, mask=inside[:, :, None], other=0)
    scale = tl.load(scales + of_feature + start, mask=inside, other=0.0)
    for step in range(start, end, BLOCKS):
        # The next step's weights are on their way while this one's are multiplied.
        inside = (step + BLOCKS + block < end)[None, :] & (feature < features)[:, None]
        next_words = tl.load(weight + word + (step + BLOCKS) * 8, mask=inside[:, :, None], other=0)
        next_scale = tl.load(scales + of_feature + step + BLOCKS, mask=inside, other=0.0)
        known = (row < rows)[:, None] & (step * 64 + column < end * 64)[None, :]
        inputs = tl.load(x + of_row + step * 64, mask=known, other=0.0).to(OPERAND)
        weights = tl.reshape(_unpack(words, scale, codes, INTERPRETED), (FEATURES, BLOCKS * 64))
        sums = tl.dot(weights, tl.trans(inputs), sums, input_precision="ieee")
        words, scale = next_words, next_scale
    target = out + (tl.program_id(1).to(tl.int64) * rows + row)[:, None] * features + feature[None, :]
    known = (row < rows)[:, None] & (feature < features)[None, :]
    tl.store(target, tl.trans(sums).to(out.dtype.element_ty), mask=known)


@triton.jit(do_not_specialize=["size"])  # type: ignore[untyped-decorator]
def _add_up(
    parts: tl.tensor,
    out: tl.tensor,
    bias: tl.tensor,
    size: tl.tensor,
    features: tl.tensor,
    SPLITS: tl.constexpr,
    BIASED: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """out [rows, features] = sum of parts [SPLITS, rows, features], and a bias: program (block of the numbers)."""
    place = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = place < size
    total = tl.load(parts + place, mask=inside, other=0.0)
    for split in tl.static_range(1, SPLITS):
        total += tl.load(parts + split * size.to(tl.int64) + place, mask=inside, other=0.0)
    if BIASED:
        total += tl.load(bias + place % features, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + place, total.to(out.dtype.element_ty), mask=inside)


def multiplies(module: nn.Module) -> bool:
    """Whether `Packed` takes this module."""
    if not isinstance(module, Linear4bit):
        return False
    return bool(module.weight.quant_state.blocksize == _BLOCK and module.in_features % _BLOCK == 0)


class Packed:
    """One or more Linear4bit modules with the same input as a single weight. The modules keep views of it, so that
    the memory is there once; their blocks' scales are held in float32."""

    def __init__(self, modules: Sequence[Any]) -> None:
        states = [module.weight.quant_state for module in modules]
        self._codes = states[0].code.float()
        self._weight = torch.cat([module.weight.data.view(-1, 1) for module in modules])
        self._words = self._weight.view(-1).view(torch.int32)
        self._scales = torch.cat([_scales(state) for state in states])
        self._blocks = modules[0].in_features // _BLOCK
        self._features = sum(module.out_features for module in modules)
        programs = triton.cdiv(self._features, 64)
        steps = triton.cdiv(self._blocks, _STEP)
        # By the weight's size alone: a row is summed in the same order whatever its company.
        self._split = _STEP * triton.cdiv(steps, min(steps, triton.cdiv(_PROGRAMS, programs)))
        self._splits = triton.cdiv(self._blocks, self._split)
        biases = [module.bias for module in modules]
        self._bias = None
        if any(bias is not None for bias in biases):
            self._bias = torch.cat(
                [
                    torch.zeros(module.out_features, device=self._weight.device)
                    if bias is None
                    else bias.detach().float()
                    for module, bias in zip(modules, biases, strict=True)
                ]
            )
        row = 0
        for module, state in zip(modules, states, strict=True):
            first, row = row, row + module.out_features
            module.weight.data = self._weight[first * self._blocks * 32 : row * self._blocks * 32]
            state.absmax = self._scales[first * self._blocks : row * self._blocks]
            state.nested, state.state2, state.offset = False, None, None
            module.support_avx512bf16_for_cpu = False  # or bitsandbytes would pack it for itself

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [rows, in], contiguous, times the weight, [rows, out]."""
        rows = len(x)
        y = torch.empty(rows, self._features, dtype=x.dtype, device=x.device)
        whole = self._splits == 1 and self._bias is None
        parts = y if whole else torch.empty(self._splits, *y.shape, dtype=torch.float32, device=x.device)
        block = min(128, max(16, triton.next_power_of_2(rows)))
        features, blocks, warps = _SHAPES[block]
        _multiply[triton.cdiv(self._features, features), self._splits, triton.cdiv(rows, block)](
            x, parts, self._words, self._scales, self._codes, rows, self._features, self._blocks, self._split,
            ROWS=block, FEATURES=features, BLOCKS=blocks, OPERAND=OPERAND, INTERPRETED=INTERPRETED,
            num_warps=warps, num_stages=1,
        )  # fmt: skip
        if not whole:
            bias = parts if self._bias is None else self._bias
            _add_up[(triton.cdiv(y.numel(), _COLUMNS),)](
                parts, y, bias, y.numel(), self._features, SPLITS=self._splits, BIASED=self._bias is not None,
                COLUMNS=_COLUMNS,
            )  # fmt: skip
        return y


def _scales(state: Any) -> torch.Tensor:
    """A weight's scales as bitsandbytes computes them where they are quantised, too."""
    if not state.nested:
        return state.absmax.float()  # type: ignore[no-any-return]
    return (dequantize_blockwise(state.absmax, state.state2) + state.offset).float()  # type: ignore[no-any-return]
