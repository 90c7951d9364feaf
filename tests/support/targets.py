"""The kinds of processor whose kernels can run on this one."""

from onebase_engine.kernels.cpu.target import AVX2, AVX512, BFLOAT16, NEON, PLAIN, TARGET, Target

_X86 = [BFLOAT16, AVX512, AVX2, PLAIN]


def runnable() -> list[Target]:
    """This processor's own first, then all lesser ones of its architecture."""
    return [NEON, PLAIN] if TARGET == NEON else _X86[_X86.index(TARGET) :]
