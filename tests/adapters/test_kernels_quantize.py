"""4-bit quantisation on CPUs gives the bits of bitsandbytes' own."""

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

import onebase_engine.kernels.cpu.quantize  # noqa: F401  (registers)
from support.batches import random_bf16


def original(weight: torch.Tensor, blocksize: int, quant_type: str) -> tuple[torch.Tensor, torch.Tensor]:
    """What bitsandbytes does where no kernel is registered for the device."""
    key = torch._C.DispatchKey.CompositeExplicitAutograd
    op = torch.ops.bitsandbytes.quantize_4bit.default
    found: tuple[torch.Tensor, torch.Tensor] = op._op_dk(key, weight, blocksize, quant_type, torch.uint8)
    return found


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(64, 128), (7, 64), (5, 13), (1, 1), (3, 33), (130, 96)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("blocksize", [32, 64])
def test_gives_the_same_bits(quant_type: str, shape: tuple[int, int], dtype: torch.dtype, blocksize: int) -> None:
    weight = (torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 0.05).to(dtype)
    weight[0] = 0
    packed, largest = original(weight, blocksize, quant_type)
    ours, state = quantize_4bit(weight, blocksize=blocksize, quant_type=quant_type)
    assert torch.equal(ours, packed)
    assert torch.equal(state.absmax, largest)


def test_is_the_kernel_that_runs() -> None:
    """And each number comes back as the nearest that its block can hold."""
    weight = random_bf16(2, 32, 64)
    packed, state = quantize_4bit(weight, quant_type="nf4")
    levels = state.code * state.absmax[:, None]  # a block is a row
    right = levels.gather(1, (weight.float()[:, :, None] - levels[:, None]).abs().argmin(-1))
    torch.testing.assert_close(dequantize_4bit(packed, state).float(), right, rtol=2**-8, atol=0)
