"""Weights of 4-bit codes: their product against its definition, in all forms of scales and offsets."""

from itertools import product

import pytest
import torch
from numba import njit

from onebase_engine.kernels.coded_linear import CodedLinear, CodedWeight
from onebase_engine.kernels.cpu.packed import PackedLinear, can_be_one, fits_packed, pack_at_first_use, packable
from onebase_engine.kernels.cpu.target import PLAIN, Target
from onebase_engine.kernels.cpu.tile4bit import Form, packed_tile
from support.targets import runnable

packs = pytest.mark.skipif(not fits_packed(128, 32), reason="needs AVX2 and FMA, or NEON")
ABLE = [target for target in runnable() if target != PLAIN]
FORMS = [Form(scales, offsets) for scales, offsets in product(("float16", "float32"), ("", "steps", "added"))]
FORMS += [Form(scales, offsets, "int8") for scales, offsets in product(("float16", "float32"), ("", "added"))]
FORMS += [Form("float32", codes="float8")]
OUT, IN = 64, 256


def weight_of(form: Form, *, block: int = 32, out: int = OUT, ordered: bool = False, seed: int = 0) -> CodedWeight:
    random = torch.Generator().manual_seed(seed)
    scales = torch.rand(IN // block, out, generator=random).to(getattr(torch, form.scales)) / 16
    offsets = None
    if form.offsets == "steps":
        offsets = torch.randint(-8, 9, (IN // block, out), generator=random).to(torch.int8)
    elif form.offsets == "added":
        offsets = torch.randn(IN // block, out, generator=random).to(scales.dtype) / 16
    codes = torch.randint(0, 256, (out, IN // 2), generator=random, dtype=torch.uint8)
    if form.codes == "float8":
        codes = torch.randn(out, IN, generator=random).to(torch.float8_e4m3fn)
        codes[0, :4] = torch.tensor([0.0, 2**-9, -(2**-7), 448])  # two that are subnormal, and the largest
    if form.codes == "int8":
        codes = torch.randint(-128, 128, (out, IN), generator=random, dtype=torch.int8)
        scales /= 16
    return CodedWeight(
        codes=codes,
        values=torch.arange(-8, 8, dtype=torch.float32),
        scales=scales,
        offsets=offsets,
        order=torch.randperm(IN, generator=random) if ordered else None,
    )


def defined(weight: CodedWeight) -> torch.Tensor:
    """A column at a time, as the class says."""
    out, columns = weight.shape
    dense = torch.empty(out, columns)
    for column in range(columns):
        if weight.codes.dtype != torch.uint8:
            number = weight.codes[:, column].float()
        else:
            byte = weight.codes[:, column // 2]
            number = weight.values[(byte >> 4 if column % 2 == 0 else byte & 15).long()]
        block = column // weight.block
        value = number * weight.scales[block].float()
        if weight.offsets is not None:
            steps = weight.scales[block].float() if weight.offsets.dtype == torch.int8 else 1
            value += weight.offsets[block].float() * steps
        dense[:, column if weight.order is None else int(weight.order[column])] = value
    return dense


def inputs(rows: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(rows, IN, generator=torch.Generator().manual_seed(seed)).bfloat16()


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_expanded_values_are_the_definition_packed_or_not(form: Form, ordered: bool) -> None:
    linear = CodedLinear(weight_of(form, ordered=ordered), None)
    expected = defined(linear.coded)
    assert torch.equal(linear.coded.expanded(), expected)
    torch.testing.assert_close(linear(inputs(3).float()), inputs(3).float() @ expected.T)
    if fits_packed(IN, OUT, 32):
        PackedLinear([linear])
        assert linear.coded.in_tiles
        assert torch.equal(linear.coded.expanded(), expected)


@packs
@pytest.mark.parametrize("block", [32, 64, 128])
@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("form", FORMS)
@torch.inference_mode()
def test_the_packed_product_is_the_definition_and_rows_do_not_depend_on_others(
    form: Form, ordered: bool, block: int
) -> None:
    bias = torch.randn(OUT, generator=torch.Generator().manual_seed(3)).bfloat16()
    linear = CodedLinear(weight_of(form, block=block, ordered=ordered), bias)
    expected = inputs(11).float() @ defined(linear.coded).T + bias.float()
    pack_at_first_use(linear)
    found = linear(inputs(11))
    assert linear.product is not None
    torch.testing.assert_close(found.float(), expected, rtol=2**-6, atol=2**-4)
    for row in range(11):
        assert torch.equal(linear(inputs(11)[row : row + 1]), found[row : row + 1])


@packs
@pytest.mark.parametrize("form", FORMS)
@torch.inference_mode()
def test_several_that_share_an_input_are_one_product_and_stay_themselves(form: Form) -> None:
    modules = [CodedLinear(weight_of(form, out=out, seed=out), None) for out in (64, 32, 96)]
    expected = [defined(module.coded) for module in modules]
    assert can_be_one(modules) and all(packable(module) for module in modules)
    joined = PackedLinear(modules)
    together = joined.product(inputs(5))
    row = 0
    for module, dense in zip(modules, expected, strict=True):
        assert torch.equal(module.coded.expanded(), dense)
        assert torch.equal(module(inputs(5)), together[:, row : row + len(dense)])
        assert module.weight.data_ptr() == joined.weight[row:].data_ptr(), "the memory is there once"
        row += len(dense)


@packs
@torch.inference_mode()
def test_those_that_differ_are_widened_and_keep_their_numbers() -> None:
    """As in a GGUF mixture: other widths, blocks, scales and offsets side by side."""
    weights = [
        weight_of(Form("float16"), out=64, seed=1),
        weight_of(Form("float32", "added"), out=32, block=64, seed=2),
        weight_of(Form("float16", "steps"), out=32, block=128, seed=3),
        weight_of(Form("float32", codes="int8"), out=96, block=16, seed=4),
    ]
    modules = [CodedLinear(weight, None) for weight in weights]
    expected = torch.cat([defined(weight) for weight in weights])
    assert can_be_one(modules)
    joined = PackedLinear(modules)
    assert joined.form == Form("float32", "added", "int8")
    assert torch.equal(torch.cat([module.coded.expanded() for module in modules]), expected)
    together = joined.product(inputs(9))
    torch.testing.assert_close(together.float(), inputs(9).float() @ expected.T, rtol=2**-6, atol=2**-4)
    for row in range(9):
        assert torch.equal(joined.product(inputs(9)[row : row + 1]), together[row : row + 1])


def test_inputs_in_another_order_are_not_joined() -> None:
    assert not packable(CodedLinear(weight_of(Form("float16"), ordered=True), None))


@pytest.mark.parametrize("target", ABLE, ids=lambda target: target.name)
@pytest.mark.parametrize("form", FORMS)
def test_a_tile_of_each_form_on_every_processor(form: Form, target: Target) -> None:
    linear = CodedLinear(weight_of(form, out=32), None)
    x, expected = inputs(8), inputs(8).float() @ defined(linear.coded).T
    packed = PackedLinear([linear])
    sums = x.float().view(8, -1, 32).sum(-1).contiguous()
    tile, blocks = packed_tile(8, target, form), IN // 32
    weight, scales, offsets, codes = (packed.description[name] for name in ("weight", "absmax", "offsets", "codes"))

    @njit  # type: ignore[untyped-decorator]
    def run(y: int, x: int, weight: int, scales: int, offsets: int, sums: int, codes: int) -> None:
        tile(y, 32, x, IN, weight, scales, offsets, 32, sums, blocks, 16, codes, weight, 0)

    found = torch.empty(8, 32, dtype=torch.bfloat16)
    run(found.data_ptr(), x.data_ptr(), weight, scales, offsets, sums.data_ptr(), codes)
    torch.testing.assert_close(found.float(), expected, rtol=2**-6, atol=2**-4)
