"""The GPU kernels: what they compute, in triton's interpreter and on a GPU if there is one; that they compile."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from support.batches import (
    deal_pages,
    make_batch,
    make_bottlenecks,
    make_linear4bit,
    make_owners,
    make_table,
    make_vectors,
    random_bf16,
)

triton = pytest.importorskip("triton", reason="triton is made for Linux")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.runtime.jit import mangle_type  # noqa: E402

from onebase_engine.kernels.cuda import attention, backend, elementwise, lowrank, matmul4bit  # noqa: E402

pytestmark = pytest.mark.slow

SHARED = 99 * 1024
"""Bytes of fast memory for a block of threads that every GPU since Ampere has."""
OPTIONS = ("num_warps", "num_stages")


@pytest.mark.parametrize(
    "where",
    ["interpreter", pytest.param("gpu", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))],
)
def test_results(where: str) -> None:
    cases = Path(__file__).with_name("cuda_cases.py")
    command = [sys.executable, "-m", "pytest", "--noconftest", "-p", "no:cacheprovider", str(cases)]
    command += ["-W", "ignore:Conversion of an array with ndim:DeprecationWarning"]  # triton's, by numpy 2.0
    environment = os.environ | ({"TRITON_INTERPRET": "1"} if where == "interpreter" else {})
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


class Built:
    """Stands in for a kernel: a launch compiles it for these arguments, down to a GPU's machine code."""

    def __init__(self, kernel: Any, capability: int) -> None:
        self.kernel = kernel
        self.target = GPUTarget("cuda", capability, 32)
        self.programs = 0

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: Any, **constants: Any) -> None:
            options = {name: constants.pop(name) for name in OPTIONS if name in constants}
            names = self.kernel.arg_names
            types = {name: mangle_type(value) for name, value in zip(names, arguments, strict=False)}
            source = ASTSource(self.kernel, types | dict.fromkeys(constants, "constexpr"), constants)
            assert list(source.signature) == names
            built = triton.compile(source, target=self.target, options=options)
            assert built.asm["cubin"]
            assert built.metadata.shared <= SHARED
            self.programs += 1

        return launch


@pytest.fixture(params=[80, 90], ids=["Ampere", "Hopper"])
def build(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Built]:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))

    def replace(module: Any, name: str) -> Built:
        built = Built(getattr(module, name), request.param)
        monkeypatch.setattr(module, name, built)
        return built

    return replace


@pytest.mark.parametrize(("in_features", "outs"), [(2048, [2048]), (2100, [70, 33, 130])])
def test_low_rank_compiles(build: Callable[..., Built], in_features: int, outs: list[int]) -> None:
    shrink, expand = build(lowrank, "_shrink"), build(lowrank, "_expand")
    table = make_table(backend, in_features, outs, [[8] * len(outs)])
    x, y = random_bf16(1, 2, in_features), random_bf16(2, 2, sum(outs))
    backend.add_low_rank(x, y, make_owners([1, 1], backend), table)
    assert shrink.programs == expand.programs == 1


def test_bottlenecks_and_vectors_compile(build: Callable[..., Built]) -> None:
    kernels = [build(lowrank, "_shrink"), build(lowrank, "_expand"), build(elementwise, "_affine_rows")]
    y, owners = random_bf16(1, 2, 512), make_owners([1, 2], backend)
    backend.add_bottleneck(y, y, owners, make_bottlenecks(backend, 512, [8, 8]), parallel=False)
    backend.affine_rows(y, owners, make_vectors(512, 3, [1]), make_vectors(512, 3, [2]))
    assert [kernel.programs for kernel in kernels] == [1, 1, 1]


@pytest.mark.parametrize(
    ("kv_heads", "group", "dim", "window", "softcap"),
    [
        (3, 3, 64, None, None),
        (8, 4, 128, None, None),
        (1, 4, 256, 512, 50.0),
        (4, 1, 80, 33, None),
        (1, 2, 512, None, None),
    ],
)
def test_attention_compiles(
    build: Callable[..., Built], kv_heads: int, group: int, dim: int, window: int | None, softcap: float | None
) -> None:
    attend, write = build(attention, "_attend"), build(attention, "_write_kv")
    batch = make_batch([(0, 3)], backend, kv_heads, deal_pages([3], 0, 4))
    q, k = random_bf16(1, 3, kv_heads * group, dim), random_bf16(2, 3, kv_heads, dim)
    caches = torch.empty(4, kv_heads, dim, 16).bfloat16(), torch.empty(4, kv_heads, 16, dim).bfloat16()
    backend.write_kv(k, k, *caches, batch)
    backend.attend(q, *caches, batch, 0.3, window, softcap)
    assert attend.programs == write.programs == 1


@pytest.mark.parametrize("rows", [1, 64, 500])
@pytest.mark.parametrize(("in_features", "out_features"), [(4096, 6144), (192, 70)])
def test_products_compile(build: Callable[..., Built], in_features: int, out_features: int, rows: int) -> None:
    multiply, add_up = build(matmul4bit, "_multiply"), build(matmul4bit, "_add_up")
    product = matmul4bit.Packed([make_linear4bit(1, in_features, out_features, bias=True)])
    product(random_bf16(1, rows, in_features))
    assert multiply.programs == add_up.programs == 1


@pytest.mark.parametrize("gemma", [False, True])
def test_what_stands_between_products_compiles(build: Callable[..., Built], gemma: bool) -> None:
    names = ("_add_rms_norm", "_rope_write", "_gate_mul")
    kernels = [build(elementwise, name) for name in names]
    x, weight = random_bf16(1, 3, 4096), random_bf16(2, 4096)
    elementwise.add_rms_norm(x, x, weight if gemma else None, weight, 1e-6, unit_offset=gemma)
    batch = make_batch([(0, 3)], backend, 2, deal_pages([3], 0, 4))
    caches = torch.empty(4, 2, 128, 16).bfloat16(), torch.empty(4, 2, 16, 128).bfloat16()
    angles = random_bf16(3, 8, 128), random_bf16(4, 8, 128)
    norms = (weight[:128], weight[:128]) if gemma else None
    elementwise.rope_write(
        random_bf16(5, 3, 8 * 128), norms, angles, *caches, batch.on_device, 1e-6, unit_offset=gemma
    )
    elementwise.gate_mul(x, gelu=gemma)
    assert [kernel.programs for kernel in kernels] == [1, 1, 1]
