"""4-bit quantisation on CPUs, to the bits of bitsandbytes' own, which takes seconds for a small model.

It is registered with bitsandbytes as its kernel for CPUs, so whoever quantises gets it; importing does that.
"""

import torch

from onebase_engine.kernels.bitsandbytes_import import get_4bit_type
from onebase_engine.kernels.cpu.quantize4bit import quantize
from onebase_engine.kernels.lean_imports import without_compiler


def quantize_4bit(
    weight: torch.Tensor, blocksize: int, quant_type: str, quant_storage: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """(packed [n / 2, 1] of `quant_storage`, largest absolute value of each block, float32)."""
    code = get_4bit_type(quant_type, device="cpu")
    order = torch.argsort(code)
    bounds = (code[order[:-1]] + code[order[1:]]) / 2
    values = weight.detach().contiguous()
    narrow = values.dtype == torch.bfloat16
    if not narrow:
        values = values.float()
    packed = torch.empty(-(-values.numel() // 2), dtype=torch.uint8)
    largest = torch.empty(-(-values.numel() // blocksize), dtype=torch.float32)
    quantize(
        values.data_ptr(), values.numel(), narrow, blocksize, bounds.numpy(), order.to(torch.uint8).numpy(),
        packed.numpy(), largest.numpy(),
    )  # fmt: skip
    return packed.view(quant_storage).unsqueeze(1), largest


with without_compiler():
    torch.library.register_kernel("bitsandbytes::quantize_4bit", "cpu", quantize_4bit)
