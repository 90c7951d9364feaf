"""The product with weights that are not in 4 bits, on CPUs that do not multiply bfloat16, where torch emulates it.

A weight's row is widened to float32 once for all rows of the input, and every sum is one compiled loop's: a row's
numbers do not depend on how many others there are.
"""

from collections.abc import Collection

import numpy as np
import torch
from numba import carray, njit, types
from torch import nn

from onebase_engine.kernels.cpu.target import TARGET
from onebase_engine.kernels.cpu.task import WHOLE, Arguments, array
from onebase_engine.kernels.cpu.vector import bf16_from_f32, f32_from_bf16, u16_pointer

_FEATURES = 32
"""Output features that a task makes."""


PRODUCT = Arguments(array(types.float32, 2), WHOLE, array(types.float32), WHOLE)
"""x [rows, in], W [out, in], bias [out] and y [rows, out]: x and bias float32, W and y addresses of bfloat16."""
_read = PRODUCT.read


@njit(nogil=True, error_model="numpy", fastmath={"reassoc", "contract"})  # type: ignore[untyped-decorator]
def _dot(x: np.ndarray, row: np.ndarray) -> np.float32:
    total = np.float32(0.0)
    for i in range(x.shape[0]):
        total += x[i] * row[i]
    return total


@PRODUCT.work
def _some_features(task: int, at: int) -> None:
    x, weight, bias, y = _read(at)
    rows, width = x.shape
    features = bias.shape[0]
    wide = np.empty(width, np.float32)
    for v in range(task * _FEATURES, min((task + 1) * _FEATURES, features)):
        narrow = carray(u16_pointer(weight + 2 * v * width), width, np.uint16)
        for i in range(width):
            wide[i] = f32_from_bf16(narrow[i])
        for r in range(rows):
            out = carray(u16_pointer(y + 2 * (r * features + v)), 1, np.uint16)
            out[0] = bf16_from_f32(_dot(x[r], wide) + bias[v])


_multiply = PRODUCT.kernel(_some_features, serial=1)


class PlainProduct:
    """In the place of the `forward` of an nn.Linear with a bfloat16 weight."""

    def __init__(self, linear: nn.Linear) -> None:
        self._linear = linear
        self._bias = np.zeros(linear.out_features, np.float32)
        if linear.bias is not None:
            self._bias += linear.bias.detach().float().numpy()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, self._linear.in_features).float().contiguous()
        y = torch.empty(len(rows), self._linear.out_features, dtype=torch.bfloat16)
        tasks = -(-self._linear.out_features // _FEATURES)
        _multiply(tasks, rows.numpy(), self._linear.weight.data_ptr(), self._bias, y.data_ptr())
        return y.view(*x.shape[:-1], self._linear.out_features)


def replace_emulated(model: nn.Module, always: Collection[nn.Module]) -> None:
    """Let linear modules with bfloat16 weights multiply so where torch would emulate it, and `always` some: in
    serving, on a CPU."""
    for module in always if TARGET.pairs else model.modules():
        if type(module) is not nn.Linear:
            continue
        if module.weight.dtype == torch.bfloat16 and module.weight.device.type == "cpu":
            module.forward = PlainProduct(module)  # type: ignore[method-assign, assignment]
