"""Frozen 4-bit weights held as the bfloat16 values that they stand for, while memory allows.

bitsandbytes' Linear4bit makes exactly these values anew in each forward and each backward pass of training.
"""

from typing import Any, cast

import torch
from torch import nn


def dequantized_bytes(model: nn.Module) -> int:
    """What `dequantize` would add, in bytes."""
    return sum(2 * module.in_features * module.out_features for _, module in _quantized(model))


def dequantize(model: nn.Module) -> None:
    """Put a bfloat16 nn.Linear in the place of every Linear4bit."""
    from bitsandbytes.functional import dequantize_4bit

    for name, module in _quantized(model):
        weight = cast(Any, module.weight)
        plain = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None, device="meta")
        values = dequantize_4bit(weight.data, weight.quant_state).to(torch.bfloat16)
        plain.weight = nn.Parameter(values, requires_grad=False)
        if module.bias is not None:
            plain.bias = module.bias
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, plain)


def keep_unpacked(model: nn.Module) -> None:
    """Stop bitsandbytes from repacking weights for its CPU inference product, which has no backward pass."""
    for _, module in _quantized(model):
        cast(Any, module).support_avx512bf16_for_cpu = False


def _quantized(model: nn.Module) -> list[tuple[str, nn.Linear]]:
    from bitsandbytes.nn import Linear4bit

    return [(name, module) for name, module in model.named_modules() if isinstance(module, Linear4bit)]
