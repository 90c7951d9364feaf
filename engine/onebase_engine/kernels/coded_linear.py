"""A linear layer whose weight is codes as a checkpoint holds them, never rounded a second time.

Invariant: a weight is `value of code * scale + offset`, with a scale, and an offset where there are any, for each
block of inputs: GPTQ, AWQ, compressed-tensors, FP8 and GGUF's kinds are all of this form. `PackedLinear` multiplies
by it as it is; everything else asks for `expanded` values.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import nn

from onebase_engine.kernels.bitsandbytes_import import Linear4bit

_NONE = torch.empty(0)
TILE = 32
"""Output features that are packed together, as bitsandbytes packs them on CPUs (see `cpu.tile4bit`)."""


@dataclass(frozen=True)
class CodedWeight:
    """A weight [out, in]."""

    codes: torch.Tensor
    """4-bit codes [out, in / 2] uint8, the first of two in the high half; numbers [out, in] int8 or float8_e4m3fn;
    or in tiles."""
    values: torch.Tensor
    """[16] float32, the value of each 4-bit code; bfloat16 holds it. Of numbers: nothing."""
    scales: torch.Tensor
    """[in / block, out] float16 or float32."""
    offsets: torch.Tensor | None = None
    """[in / block, out], of the scales' dtype; or int8, in steps of the scales."""
    order: torch.Tensor | None = None
    """[in] int64: the input that each column of codes is for, where they are not in their order."""
    in_tiles: bool = False
    """Whether the codes are packed, `TILE` rows together."""

    @property
    def wide(self) -> bool:
        """Whether a code is a number of 8 bits."""
        return self.codes.dtype != torch.uint8

    @property
    def shape(self) -> tuple[int, int]:
        """The weight's: outputs and inputs."""
        out, width = self.codes.shape
        return out, width if self.wide else 2 * width

    @property
    def block(self) -> int:
        """Inputs of one scale."""
        return self.shape[1] // self.scales.shape[0]

    @property
    def bytes(self) -> int:
        """Memory that it takes."""
        parts = (self.codes, self.scales, self.offsets, self.order)
        return sum(part.numel() * part.element_size() for part in parts if part is not None)

    def to(self, device: torch.device) -> "CodedWeight":
        """The same on a device."""
        parts = {name: getattr(self, name) for name in ("codes", "values", "scales", "offsets", "order")}
        return replace(self, **{name: part.to(device) for name, part in parts.items() if part is not None})

    def expanded(self) -> torch.Tensor:
        """[out, in] float32, exactly."""
        dense = self.numbers().view(len(self.codes), -1, self.block) * self.scales.T.float()[..., None]
        if self.offsets is not None:
            offsets = self.offsets.float() * (self.scales.float() if self.offsets.dtype == torch.int8 else 1)
            dense += offsets.T[..., None]
        dense = dense.view(len(self.codes), -1)
        if self.order is None:
            return dense
        ordered = torch.empty_like(dense)
        ordered[:, self.order] = dense
        return ordered

    def numbers(self) -> torch.Tensor:
        """The codes' values [out, in] float32, in their own order."""
        out, width = self.codes.shape
        if self.wide:
            codes = self.codes.float()
            if self.in_tiles:
                codes = codes.reshape(-1, width // 2, 2, TILE // 2, 2).permute(0, 2, 3, 1, 4).reshape(out, width)
            return codes
        if not self.in_tiles:
            indices = torch.stack([self.codes >> 4, self.codes & 15], -1)
        else:
            tiles = self.codes.reshape(-1, width, TILE // 2, 2)
            indices = torch.stack([tiles & 15, tiles >> 4], 1).permute(0, 1, 3, 2, 4)
        return self.values[indices.reshape(out, -1).int()]

    def widened(self, block: int) -> "CodedWeight":
        """The same numbers as int8 codes with float32 scales and offsets to add, in blocks of `block` inputs, which
        divides its own: the form that all kinds but float8 have."""
        times = self.block // block
        scales = self.scales.float()
        offsets = torch.zeros_like(scales) if self.offsets is None else self.offsets.float()
        if self.offsets is not None and self.offsets.dtype == torch.int8:
            offsets = offsets * scales
        scales, offsets = (each.repeat_interleave(times, 0).contiguous() for each in (scales, offsets))
        return CodedWeight(self.numbers().to(torch.int8), _NONE, scales, offsets, self.order)


class CodedLinear(nn.Linear):
    """x [..., in] -> x W^T + bias. Its parameter `weight` is the codes."""

    def __init__(self, coded: CodedWeight, bias: torch.Tensor | None) -> None:
        out_features, in_features = coded.shape
        super().__init__(in_features, out_features, bias=False, device="meta")
        self.weight = nn.Parameter(coded.codes, requires_grad=False)
        if bias is not None:
            self.bias = nn.Parameter(bias, requires_grad=False)
        self.coded = coded
        self.pack: Callable[[CodedLinear], None] | None = None
        """Packs it at its first use, where there is a product for it."""
        self.product: Callable[[torch.Tensor], torch.Tensor] | None = None
        """Its product, once it is packed: x [..., in], in the order of its codes, to [..., out]."""

    def put(self, coded: CodedWeight, product: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """The same weight, packed."""
        self.coded, self.product = coded, product
        self.weight.data = coded.codes

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.product is None and self.pack is not None:
            self.pack(self)
        if self.product is None:
            return nn.functional.linear(x, self.coded.expanded().to(x.dtype), self.bias)
        return self.product(x if self.coded.order is None else x[..., self.coded.order])


def is_coded(module: nn.Module) -> bool:
    """Whether its weight is codes, of any kind."""
    return isinstance(module, Linear4bit | CodedLinear)
