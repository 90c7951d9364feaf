"""The arithmetic of a run: bfloat16 products where the processor multiplies bfloat16, else float32 ones.

What decides is a measured product, forth and back: without instructions of its own a processor emulates bfloat16,
and takes from two to forty times as long as in float32.
"""

import time
from dataclasses import dataclass

import torch
from torch import nn

from onebase_contract.settings import Arithmetic

DTYPES: dict[Arithmetic, torch.dtype] = {"bf16": torch.bfloat16, "float32": torch.float32}

_ROWS, _IN, _OUT = 64, 576, 1536
"""Sizes of the product that is timed: a small model's, with the tokens of a short step."""
_TIMES = 3
_EMULATED = 1.2
"""Times float32's time: what takes longer is not multiplied, but emulated."""


@dataclass(frozen=True)
class Speeds:
    """Milliseconds of a linear layer's products, forth and back, in each arithmetic."""

    bf16: float
    float32: float

    @property
    def emulated(self) -> bool:
        """Whether bfloat16 costs more than float32."""
        return self.bf16 > _EMULATED * self.float32

    def __str__(self) -> str:
        return f"a product forth and back takes {self.bf16:.1f} ms in bfloat16, {self.float32:.1f} in float32"


def choose_arithmetic(wanted: Arithmetic | None, device: torch.device) -> tuple[Arithmetic, str]:
    """The arithmetic on `device`, and why in a sentence."""
    if device.type == "cuda":
        own = torch.cuda.is_bf16_supported(including_emulation=False)
        return wanted or ("bf16" if own else "float32"), f"this GPU {'multiplies' if own else 'emulates'} bfloat16"
    speeds = measure_speeds()
    chosen = wanted or ("float32" if speeds.emulated else "bf16")
    told = f"this processor {'emulates' if speeds.emulated else 'multiplies'} bfloat16: {speeds}"
    if chosen == "bf16" and speeds.emulated:
        told = f"careful, {told}; --arithmetic float32 trains {speeds.bf16 / speeds.float32:.0f} times as fast"
    return chosen, told


def measure_speeds() -> Speeds:
    """On this processor, with the threads that torch has."""
    return Speeds(*(_milliseconds(dtype) for dtype in (torch.bfloat16, torch.float32)))


def _milliseconds(dtype: torch.dtype) -> float:
    x, weight = torch.ones(_ROWS, _IN, dtype=dtype), torch.ones(_OUT, _IN, dtype=dtype)
    grad = torch.ones(_ROWS, _OUT, dtype=dtype)

    def once() -> float:
        start = time.perf_counter()
        nn.functional.linear(x, weight)
        torch.mm(grad, weight)
        return time.perf_counter() - start

    once()
    return 1000 * min(once() for _ in range(_TIMES))
