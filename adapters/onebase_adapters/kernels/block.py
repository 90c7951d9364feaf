"""The cache's page size, on which kernels, model and bookkeeping agree."""

BLOCK = 16
"""Tokens in a cache block: one vector of keys on a CPU."""
