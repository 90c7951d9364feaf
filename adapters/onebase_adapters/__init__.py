"""What an adapter is: methods, their lowering to primitives, files, store, kernels, and their base."""
