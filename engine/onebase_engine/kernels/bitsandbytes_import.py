"""bitsandbytes, imported cheaply: import it from here first."""

from onebase_engine.kernels.lean_imports import without_compiler

with without_compiler():
    from bitsandbytes.nn import Linear4bit, Params4bit

__all__ = ["Linear4bit", "Params4bit"]
