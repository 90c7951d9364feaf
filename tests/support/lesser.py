"""pytest as on a processor with AVX2 and no more, on a better one of its architecture: `python -m support.lesser
PYTEST'S ARGUMENTS`, with `ENVIRONMENT` set before Python starts."""

import ctypes
import sys

import pytest

ENVIRONMENT = {
    "NUMBA_CPU_NAME": "haswell",
    "NUMBA_CPU_FEATURES": "+avx2,+fma,+f16c,+bmi,+bmi2,+lzcnt,+popcnt,+movbe",
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
}


def main() -> None:
    find = ctypes.CDLL.__getattr__

    def find_no_bf16(library: ctypes.CDLL, name: str) -> object:
        if name == "has_avx512bf16_cpu":  # bitsandbytes' question, which this leaves it to answer with no
            raise AttributeError(name)
        return find(library, name)

    ctypes.CDLL.__getattr__ = find_no_bf16  # type: ignore[method-assign]
    from onebase_engine.kernels.cpu.target import AVX2, TARGET

    if TARGET != AVX2:
        raise SystemExit(f"Kernels are compiled for {TARGET.name}, not for AVX2.")
    sys.exit(pytest.main(sys.argv[1:]))


if __name__ == "__main__":
    main()
