"""PEFT's plain LoRA layer as one autograd function.

PEFT composes it of six operations, three of which only carry [tokens, out] arrays to memory and back. Here the
update is added by the matrix product itself, forth and back. The numbers are PEFT's but for roundings to bfloat16
that no longer happen in between.
"""

from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import nn

from onebase_contract.settings import TrainConfig
from onebase_training.model.frozen_weights import FrozenLinear


class _LoraProduct(torch.autograd.Function):
    """x [N, in], frozen W [out, in] and bias [out], a [r, in], b [out, r] -> x W^T + bias + scale (x a^T) b^T.

    `expand` gives W, forth and back. Computes in W's dtype; a and b are float32, and so are their gradients.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        expand: Callable[[], torch.Tensor],
        bias: torch.Tensor | None,
        a: torch.Tensor,
        b: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        weight = expand()
        x, a, b = x.to(weight.dtype), a.to(weight.dtype), b.to(weight.dtype)
        inner = x @ a.T
        out = nn.functional.linear(x, weight, bias)
        out.addmm_(inner, b.T, alpha=scale)
        ctx.save_for_backward(x, a, b, inner)
        ctx.expand = expand
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, a, b, inner = ctx.saved_tensors
        grad = grad.to(x.dtype)
        d_inner = (grad @ b).mul_(ctx.scale)
        d_x = None
        if ctx.needs_input_grad[0]:
            d_x = grad @ ctx.expand()
            d_x.addmm_(d_inner, a)
        d_a = d_inner.T @ x
        d_b = (grad.T @ inner).mul_(ctx.scale)
        return d_x, None, None, d_a.float(), d_b.float(), None


def speed_up(model: nn.Module, config: TrainConfig) -> int:
    """Let plain LoRA layers on frozen linear modules run as one function; returns how many do.

    Not with ZeRO-3, which finds out by the calls of modules which weights it must gather.
    """
    if config.deepspeed == "zero3":
        return 0
    layers = [module for module in model.modules() if type(module) is LoraLinear and _plain(module)]
    for layer in layers:
        layer.forward = _Forward(layer)
    return len(layers)


class _Forward:
    """Takes the place of a layer's `forward`. PEFT's own still answers where the layer is not as it was trained."""

    def __init__(self, layer: LoraLinear) -> None:
        self._layer = layer
        self._usual = layer.forward

    def __call__(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        layer: Any = self._layer
        if layer.disable_adapters or layer.merged or args or kwargs:
            usual: torch.Tensor = self._usual(x, *args, **kwargs)
            return usual
        base = layer.base_layer
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        rows = x.reshape(-1, x.shape[-1])
        bias = base.bias
        expand = base.expand if isinstance(base, FrozenLinear) else lambda: base.weight
        out: torch.Tensor = _LoraProduct.apply(rows, expand, bias, a, b, layer.scaling["default"])  # type: ignore[no-untyped-call]
        return out.view(*x.shape[:-1], -1)


def _plain(layer: Any) -> bool:
    base = layer.base_layer
    return (
        type(base) in (nn.Linear, FrozenLinear)
        and not base.weight.requires_grad
        and layer.active_adapters == ["default"]
        and "default" not in layer.lora_variant
        and isinstance(layer.lora_dropout["default"], nn.Identity)
        and not layer.lora_bias["default"]
    )
