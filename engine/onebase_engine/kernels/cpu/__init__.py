"""The kernels for CPUs, compiled by numba: no compiler needed on the machine, LLVM comes in its wheel."""
