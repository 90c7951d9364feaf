"""The processor that kernels are compiled for: what it can do that they differ by, in one place.

It is numba's target: this machine's processor, or the lesser one that NUMBA_CPU_NAME and NUMBA_CPU_FEATURES name,
which is how every kind is tested on one machine. numba keeps what it compiled apart by the same names.
"""

from dataclasses import dataclass

from numba.core.registry import cpu_target


@dataclass(frozen=True)
class Target:
    """A kind of processor."""

    name: str
    accumulators: int
    """Vectors of 16 float32 that a tile can sum up in registers."""
    pairs: bool = False
    """Whether it multiplies pairs of bfloat16."""
    words: bool = False
    """Whether it looks up 16-bit words in a table of 32."""
    look_up: tuple[str, int] | None = None
    """Else LLVM's function that looks up bytes in a table of 16, and how many it takes at once."""


BFLOAT16 = Target("AVX-512 BF16", 32, pairs=True, words=True)
AVX512 = Target("AVX-512", 32, words=True)
AVX2 = Target("AVX2", 4, look_up=("llvm.x86.avx2.pshuf.b", 32))
NEON = Target("NEON", 4, look_up=("llvm.aarch64.neon.tbl1.v16i8", 16))
PLAIN = Target("a processor without AVX2 and FMA, or NEON", 4)


def target_of(triple: str, features: str) -> Target:
    """What code for LLVM's `triple` with `features` ("+avx2,-avx512f") can use."""
    present = {feature[1:] for feature in features.split(",") if feature.startswith("+")}
    if triple.startswith(("aarch64", "arm64")):
        return NEON
    if present >= {"avx512f", "avx512bw"}:
        return BFLOAT16 if "avx512bf16" in present else AVX512
    return AVX2 if present >= {"avx2", "fma"} else PLAIN


TARGET = target_of(*cpu_target.target_context.codegen().magic_tuple()[::2])
