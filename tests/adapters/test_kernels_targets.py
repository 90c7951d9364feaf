"""Kernels for other processors than this one: the lesser ones of its architecture run, NEON compiles."""

import inspect
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from llvmlite import binding, ir
from numba import njit

from onebase_engine.kernels.cpu.packed import PackedLinear, multiply_packed
from onebase_engine.kernels.cpu.pairs import pair_tile
from onebase_engine.kernels.cpu.target import AVX2, AVX512, BFLOAT16, NEON, PLAIN, TARGET, Target, target_of
from onebase_engine.kernels.cpu.tile4bit import packed_tile
from support import lesser
from support.batches import random_bf16
from support.targets import runnable

pytestmark = pytest.mark.slow

ABLE = [target for target in runnable() if target != PLAIN]
ARM = "aarch64-unknown-linux-gnu"
TESTS = Path(__file__).parents[1]
COMPANY = TESTS / "engine" / "test_company.py"


@pytest.mark.parametrize(
    ("triple", "features", "target"),
    [
        ("x86_64-unknown-linux-gnu", "+avx2,+avx512bf16,+avx512bw,+avx512f,+fma", BFLOAT16),
        ("x86_64-unknown-linux-gnu", "+avx2,-avx512bf16,+avx512bw,+avx512f,+fma", AVX512),
        ("x86_64-unknown-linux-gnu", "+avx2,-avx512bw,+avx512f,+fma", AVX2),
        ("x86_64-unknown-linux-gnu", "+avx,-avx2,-fma", PLAIN),
        ("x86_64-unknown-linux-gnu", "", PLAIN),
        ("aarch64-unknown-linux-gnu", "+neon", NEON),
        ("arm64-apple-darwin23", "", NEON),
    ],
)
def test_the_target_is_read_from_llvms_features(triple: str, features: str, target: Target) -> None:
    assert target_of(triple, features) == target


def make_linear(quant_type: str) -> Linear4bit:
    linear = Linear4bit(
        128, 32, bias=False, compute_dtype=torch.bfloat16, compress_statistics=False, quant_type=quant_type
    )
    linear.weight.data = random_bf16(1, 32, 128, scale=0.1)
    return linear.to("cpu").eval()


def product_by_definition(x: torch.Tensor, linear: Linear4bit) -> torch.Tensor:
    return x.float() @ dequantize_4bit(linear.weight.data, linear.weight.quant_state).float().t()


@pytest.mark.parametrize("target", ABLE, ids=lambda target: target.name)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_a_packed_tile_is_a_product_in_any_number_of_rows(target: Target, quant_type: str) -> None:
    linear, x = make_linear(quant_type), random_bf16(2, 8, 128)
    expected = product_by_definition(x, linear)
    packed = PackedLinear([linear])
    codes, weight, scales = (packed.description[name] for name in ("codes", "weight", "absmax"))
    found = {}
    for rows in (1, 2, 3, 4, 8):
        tile = packed_tile(rows, target)

        @njit  # type: ignore[untyped-decorator]
        def run(y: int, x: int, weight: int, scales: int, codes: int) -> None:
            tile(y, 32, x, 128, weight, scales, 0, 32, 0, 2, 32, codes, weight, 0)  # noqa: B023

        found[rows] = torch.empty(rows, 32, dtype=torch.bfloat16)
        run(found[rows].data_ptr(), x.data_ptr(), weight, scales, codes)
    torch.testing.assert_close(found[8].float(), expected, rtol=2**-6, atol=2**-6)
    for rows, some in found.items():
        assert torch.equal(some, found[8][:rows])


@pytest.mark.skipif(not ABLE, reason="needs AVX2 and FMA, or NEON")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@torch.inference_mode()
def test_bitsandbytes_modules_multiply_by_it_where_it_has_no_product_of_its_own(dtype: torch.dtype) -> None:
    """What is registered then, called as it is called."""
    linear, x = make_linear("nf4"), random_bf16(2, 2, 3, 128)
    expected = product_by_definition(x, linear)
    PackedLinear([linear])
    state = linear.weight.quant_state
    found = multiply_packed(x.to(dtype), linear.weight.data, state.shape, state.absmax, state.code, state.blocksize)
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), expected, rtol=2**-6, atol=2**-6)


@pytest.mark.parametrize("tile", [packed_tile(8, NEON), pair_tile(4, 4, 1, paired=False, target=NEON)])
def test_tiles_compile_for_neon(tile: Any) -> None:
    """To the instructions that are meant, on any machine whose LLVM knows the architecture."""
    binding.initialize_all_targets()
    binding.initialize_all_asmprinters()
    try:
        machine = binding.Target.from_triple(ARM).create_target_machine(cpu="neoverse-n1")
    except RuntimeError:
        pytest.skip("this LLVM was built without ARM")
    signature, codegen = tile._defn(None, *[None] * (len(inspect.signature(tile._defn).parameters) - 1))
    module = ir.Module()
    module.triple = ARM
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [ir.IntType(64)] * len(signature.args)), "tile")
    builder = ir.IRBuilder(function.append_basic_block())
    codegen(SimpleNamespace(get_dummy_value=lambda: None), builder, signature, function.args)
    builder.ret_void()
    assembly = machine.emit_assembly(binding.parse_assembly(str(module)))
    assert "fmla" in assembly
    assert "tbl" in assembly or "packed" not in tile._name


@pytest.mark.skipif(AVX2 not in ABLE, reason="needs AVX2 and FMA")
@pytest.mark.skipif(TARGET == AVX2, reason="this processor is such a one: tests/engine has run here")
def test_tokens_are_the_same_in_any_company_on_a_processor_with_avx2() -> None:
    """The engine's own test of that, fused and not, in a process whose kernels are compiled for it."""
    command = [sys.executable, "-m", "support.lesser", "-q", "-p", "no:cacheprovider", str(COMPANY)]
    command += ["-k", "in_a_mix or qwen2 or gemma2"]
    path = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | lesser.ENVIRONMENT | {"PYTHONPATH": path}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
