"""Adapters as data: primitives, their lowering from every method, files on disk, store. No kernels, no model."""
