"""The kernels for NVIDIA GPUs, in triton."""
