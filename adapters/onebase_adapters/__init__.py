"""What an adapter is: methods, their lowering to primitives, files, store, kernels, and the base they sit on."""
