"""Which base, and how it is held: a plain value that needs no torch."""

from dataclasses import dataclass
from typing import Literal

DEFAULT_BASE = "smollm2-135m-instruct"


Quantization = Literal["nf4", "fp4", "none"]


@dataclass(frozen=True)
class BaseSpec:
    """Which base, and how it is held in memory. Serving and training must agree on all but the device."""

    model: str = DEFAULT_BASE
    """Catalog name, folder, .gguf file, or hub id."""
    quantization: Quantization = "nf4"
    """4-bit format of the linear sites (QLoRA, Dettmers et al. 2023, section 3); `none` keeps bfloat16."""
    double_quant: bool = True
    """Quantise the 4-bit blocks' scales to 8 bit too (QLoRA, section 3)."""
    device: str = "auto"
    """`cpu`, `cuda`, `cuda:N`, or `auto`: cuda where there is one."""
