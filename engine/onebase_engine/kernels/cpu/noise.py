"""Gumbel noise by hashing, for drawing tokens: number v of a seed is a function of both and of nothing else.

In operations that LLVM vectorises: a vocabulary's worth costs less than reading its logits.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from onebase_engine.kernels.cpu.task import Compiled, array
from onebase_engine.kernels.cpu.vector import F32, I32


@intrinsic  # type: ignore[untyped-decorator]
def _bits(typingctx: Any, value: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], I32)

    return types.int32(types.float32), codegen


@intrinsic  # type: ignore[untyped-decorator]
def _float(typingctx: Any, bits: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], F32)

    return types.float32(types.int32), codegen


@intrinsic  # type: ignore[untyped-decorator]
def _mix(typingctx: Any, value: Any) -> Any:
    """Every bit of 32 depends on every other (MurmurHash3's finaliser)."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        h = args[0]
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
            h = builder.mul(builder.xor(h, builder.lshr(h, ir.Constant(I32, shift))), ir.Constant(I32, factor))
        return builder.xor(h, builder.lshr(h, ir.Constant(I32, 16)))

    return types.uint32(types.uint32), codegen


@njit(nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _log(x: np.float32) -> np.float32:
    """Natural logarithm of a normal positive float32, to 2 units in the last place (Cephes' logf)."""
    bits = np.int32(_bits(x) - np.int32(0x3F3504F3))
    exponent = np.float32(np.int32(bits >> 23))
    m = _float(np.int32(np.int32(bits & np.int32(0x7FFFFF)) + np.int32(0x3F3504F3))) - np.float32(1.0)
    p = np.float32(7.0376836292e-2)
    p = p * m - np.float32(1.1514610310e-1)
    p = p * m + np.float32(1.1676998740e-1)
    p = p * m - np.float32(1.2420140846e-1)
    p = p * m + np.float32(1.4249322787e-1)
    p = p * m - np.float32(1.6668057665e-1)
    p = p * m + np.float32(2.0000714765e-1)
    p = p * m - np.float32(2.4999993993e-1)
    p = p * m + np.float32(3.3333331174e-1)
    square = m * m
    low = m * square * p - np.float32(2.12194440e-4) * exponent - np.float32(0.5) * square
    whole: np.float32 = (m + low) + np.float32(0.693359375) * exponent
    return whole


# Called, not inlined, it would keep the loops around it from being vectorised: 49152 tokens 680 us, not 60.
@njit(nogil=True, error_model="numpy", inline="always")  # type: ignore[untyped-decorator]
def _gumbel(v: np.uint32, low: np.uint32, high: np.uint32) -> np.float32:
    mixed = _mix(np.uint32(_mix(np.uint32(v ^ low)) ^ high))
    u = (np.float32(mixed) + np.float32(0.5)) * np.float32(2.0**-32)
    # -log(1 - u) is as good as -log(u), and small where the largest noise comes from: there it is exact.
    small = u * (np.float32(1.0) + u * (np.float32(0.5) + u * np.float32(1 / 3)))
    rest = max(np.float32(1.0) - u, np.float32(2.0**-24))
    noise: np.float32 = -_log(small if u < np.float32(0.004) else -_log(rest))
    return noise


@njit(nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def gumbel_all(values: np.ndarray, seed: np.uint64) -> None:
    """See `add_gumbel`."""
    low, high = np.uint32(seed & np.uint64(0xFFFFFFFF)), np.uint32(seed >> np.uint64(32))
    for v in range(values.shape[0]):
        values[v] += _gumbel(np.uint32(v), low, high)


def _gumbel_of(values: np.ndarray, tokens: np.ndarray, seed: np.uint64) -> None:
    low, high = np.uint32(seed & np.uint64(0xFFFFFFFF)), np.uint32(seed >> np.uint64(32))
    for i in range(values.shape[0]):
        values[i] += _gumbel(np.uint32(tokens[i]), low, high)


_ALL = Compiled(gumbel_all.py_func, "noise.all", (array(types.float32), types.uint64))
_OF = Compiled(_gumbel_of, "noise.of", (array(types.float32), array(types.int64), types.uint64))


def add_gumbel(values: np.ndarray, seed: np.uint64) -> None:
    """values[v] += -log(-log(u)), u uniform in (0, 1) by (seed, v); float32 [n]."""
    _ALL.call(values, seed)


def add_gumbel_of(values: np.ndarray, tokens: np.ndarray, seed: np.uint64) -> None:
    """As `add_gumbel`, where values[i] is that of tokens[i], int64."""
    _OF.call(values, tokens, seed)
