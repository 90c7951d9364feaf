"""4-bit quantisation on CPUs, to the bits of bitsandbytes' own, which takes seconds for a small model.

It is registered with bitsandbytes as its kernel for CPUs, so whoever quantises gets it; importing does that.
"""

import numpy as np
import torch
from bitsandbytes.functional import get_4bit_type
from numba import njit, prange

from onebase_adapters.kernels.cpu.vector import larger


@njit(cache=True, nogil=True, error_model="numpy", fastmath=True)  # type: ignore[untyped-decorator]
def _largest(values: np.ndarray) -> np.float32:
    """Of the absolute values; the same in any order."""
    highest = np.float32(0.0)
    for i in range(values.shape[0]):
        highest = larger(highest, abs(values[i]))
    return highest


@njit(cache=True, nogil=True, error_model="numpy", parallel=True)  # type: ignore[untyped-decorator]
def _quantize(
    values: np.ndarray, block: int, bounds: np.ndarray, order: np.ndarray, packed: np.ndarray, largest: np.ndarray
) -> None:
    """values [n] float32 in blocks -> packed [(n + 1) // 2] uint8 (first of two in the high half), largest [blocks]
    float32. A number's code is `order` of how many of the ascending `bounds` are below it."""
    n = values.shape[0]
    for b in prange(largest.shape[0]):
        part = values[b * block : min(n, (b + 1) * block)]
        highest = _largest(part)
        floor = max(highest, np.float32(1e-38))
        largest[b] = highest if part.shape[0] == block else floor
        inverse = np.float32(1.0) / floor
        below = np.zeros(block, np.int32)
        scaled = np.zeros(block, np.float32)
        for i in range(part.shape[0]):
            # bitsandbytes multiplies in whole blocks and divides in the last, shorter one.
            value = part[i] * inverse if part.shape[0] == block else part[i] / floor
            scaled[i] = min(max(value, np.float32(-1.0)), np.float32(1.0))
        for bound in bounds:
            for i in range(block):
                below[i] += scaled[i] > bound
        target = packed[b * block // 2 : min(packed.shape[0], (b + 1) * block // 2)]
        for i in range(target.shape[0]):
            target[i] = (order[below[2 * i]] << 4) | order[below[2 * i + 1]]


@torch.library.register_kernel("bitsandbytes::quantize_4bit", "cpu")  # type: ignore[untyped-decorator]
def quantize_4bit(
    weight: torch.Tensor, blocksize: int, quant_type: str, quant_storage: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """(packed [n / 2, 1] of `quant_storage`, largest absolute value of each block, float32)."""
    code = get_4bit_type(quant_type, device="cpu")
    order = torch.argsort(code)
    bounds = (code[order[:-1]] + code[order[1:]]) / 2
    values = weight.detach().reshape(-1).float()
    packed = torch.empty(-(-len(values) // 2), dtype=torch.uint8)
    largest = torch.empty(-(-len(values) // blocksize), dtype=torch.float32)
    _quantize(
        values.numpy(), blocksize, bounds.numpy(), order.to(torch.uint8).numpy(), packed.numpy(), largest.numpy()
    )  # fmt: skip
    return packed.view(quant_storage).unsqueeze(1), largest
