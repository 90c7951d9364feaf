"""The kernels: one contract (`interface`), three backends (reference, CPU, CUDA), chosen once for a model."""
