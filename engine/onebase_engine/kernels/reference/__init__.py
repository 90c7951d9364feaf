"""The kernels' definitions in plain torch."""
