"""bitsandbytes' 4-bit linear modules, made to run on our packed product where it can multiply them."""

from typing import Any

import torch

from onebase_engine.kernels.bitsandbytes_import import Linear4bit, Params4bit
from onebase_engine.kernels.cpu import quantize as quantize  # bitsandbytes' kernel from here on
from onebase_engine.kernels.cpu.packed import pack_at_first_use


def choose_packing(model: torch.nn.Module) -> None:
    """Let 4-bit weights be packed at their first use where the packed product can multiply them."""
    for module in model.modules():
        pack_at_first_use(module)


def nf4_copy(head: Any) -> Linear4bit:
    """The head in NF4; a tied embedding stays as it is."""
    return in_4bit(head, "nf4")


def in_4bit(linear: Any, quant_type: str, *, double_quant: bool = False) -> Linear4bit:
    """A copy of a linear module in 4 bits, where it is; `quant_type` is nf4 or fp4."""
    copy = Linear4bit(
        linear.in_features, linear.out_features, bias=linear.bias is not None, compute_dtype=linear.weight.dtype,
        compress_statistics=double_quant, quant_type=quant_type, device="meta",
    )  # fmt: skip
    copy.weight = Params4bit(
        linear.weight.detach().clone(), requires_grad=False, compress_statistics=double_quant, quant_type=quant_type
    )
    copy.bias = linear.bias
    copy = copy.to(linear.weight.device).eval()
    pack_at_first_use(copy)  # as in `base.load`
    return copy
