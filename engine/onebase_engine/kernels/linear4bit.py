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
    copy = Linear4bit(
        head.in_features, head.out_features, bias=head.bias is not None, compute_dtype=head.weight.dtype,
        compress_statistics=False, quant_type="nf4", device="meta",
    )  # fmt: skip
    copy.weight = Params4bit(
        head.weight.detach().clone(), requires_grad=False, compress_statistics=False, quant_type="nf4"
    )
    copy.bias = head.bias
    copy = copy.to(head.weight.device).eval()
    pack_at_first_use(copy)  # as in `base.load`
    return copy
