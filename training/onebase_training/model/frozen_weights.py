"""The base's frozen weights in training: held as plain matrices, or kept as they are and expanded for each product.

Expanding costs a fortieth of a float32 product and an eighth of a bfloat16 one; holding costs memory. Both give a
product the very same values: the bfloat16 ones that the 4-bit codes stand for, in the run's arithmetic.
"""

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import nn

from onebase_engine.kernels.coded_linear import CodedLinear, is_coded


class FrozenLinear(nn.Linear):
    """x [..., in] -> x W^T + bias in `dtype`, with W kept in 4 bits or bfloat16. Gradients flow to x and bias."""

    def __init__(self, linear: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight = linear.weight
        self.bias = linear.bias
        self._dtype = dtype
        self._coded = linear.coded if isinstance(linear, CodedLinear) else None

    def expand(self) -> torch.Tensor:
        """W [out, in] in the arithmetic's dtype, made anew."""
        values = _values(self.weight) if self._coded is None else self._coded.expanded()
        return values.to(self._dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        product: torch.Tensor = _Product.apply(x, self.bias, self)  # type: ignore[no-untyped-call]
        return product


class _Product(torch.autograd.Function):
    """x [..., in], bias [out] or None -> x W^T + bias. Keeps nothing for the backward pass but the module."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, bias: torch.Tensor | None, module: FrozenLinear) -> torch.Tensor:
        ctx.module = module
        weight = module.expand()
        return nn.functional.linear(x.to(weight.dtype), weight, None if bias is None else bias.to(weight.dtype))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        d_x = d_bias = None
        if ctx.needs_input_grad[0]:
            weight = ctx.module.expand()
            d_x = grad.to(weight.dtype) @ weight
        if ctx.needs_input_grad[1]:
            d_bias = grad.flatten(0, -2).sum(0)
        return d_x, d_bias, None


def held_bytes(model: nn.Module, dtype: torch.dtype) -> int:
    """Return the memory that `hold` would add, in bytes."""
    quantized = sum(dtype.itemsize * module.in_features * module.out_features for _, module in _quantized(model))
    return quantized + sum(
        value.numel() * (dtype.itemsize - value.itemsize)
        for value in model.parameters()
        if _converted(value, dtype)
    )


def hold(model: nn.Module, dtype: torch.dtype) -> None:
    """Make every weight a plain one of `dtype`."""
    for name, module in _quantized(model):
        plain = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
        plain.weight = nn.Parameter(FrozenLinear(module, dtype).expand(), requires_grad=False)
        plain.bias = module.bias
        model.set_submodule(name, plain)
    _convert(model, dtype)


def expand_in_passes(model: nn.Module, dtype: torch.dtype) -> None:
    """Leave the weights of linear modules and embeddings as they are, and let them compute in `dtype`."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Embedding):
            module.register_forward_hook(lambda _, __, made: made.to(dtype))
        elif (type(module) is nn.Linear and _converted(module.weight, dtype)) or is_coded(module):
            model.set_submodule(name, FrozenLinear(cast(nn.Linear, module), dtype))
    _convert(model, dtype, but=(nn.Embedding, FrozenLinear))


def _convert(model: nn.Module, dtype: torch.dtype, but: tuple[type[nn.Module], ...] = ()) -> None:
    """In place, so that tied weights stay tied."""
    for module in model.modules():
        for name, value in module.named_parameters(recurse=False):
            if _converted(value, dtype) and (name == "bias" or not isinstance(module, but)):
                value.data = value.data.to(dtype)


def _converted(value: torch.Tensor, dtype: torch.dtype) -> bool:
    return value.dtype == torch.bfloat16 != dtype


def _values(weight: torch.Tensor) -> torch.Tensor:
    """Floating-point [out, in]."""
    from onebase_engine.kernels.bitsandbytes_import import dequantize_4bit

    state = getattr(weight, "quant_state", None)
    return weight.detach() if state is None else dequantize_4bit(weight.data, state).to(torch.bfloat16)


def _quantized(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    return ((name, cast(nn.Linear, module)) for name, module in list(model.named_modules()) if is_coded(module))
