"""Importing transformers and bitsandbytes without torch's compiler and without what spreads a model over processes.

They only decorate functions for torch.compile, which nobody here runs, but that alone imports the compiler: over a
second of every start, sympy included, and memory for as long as the process lives.
"""

import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch

_COMPILER = "torch._dynamo"


def _leave(function: Callable[..., Any] | None = None, *_: Any, **__: Any) -> Any:
    return function if callable(function) else _leave


class _NoCompiler(ModuleType):
    """In place of the compiler: each of its decorators leaves the function as it is."""

    @staticmethod
    def is_compiling() -> bool:
        return False

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _leave


@contextmanager
def without_compiler() -> Iterator[None]:
    """What is imported meanwhile is not prepared for torch.compile (unless the compiler is there already)."""
    spec = importlib.util.find_spec(_COMPILER) if _COMPILER not in sys.modules else None
    if spec is None:
        yield
        return
    stand_in = _NoCompiler(_COMPILER)
    stand_in.__spec__, stand_in.__path__ = spec, list(spec.submodule_search_locations or ())
    outside: Any = torch
    kept = (torch.compile, outside._disable_dynamo)
    outside.compile = outside._disable_dynamo = _leave
    sys.modules[_COMPILER] = outside._dynamo = stand_in
    try:
        yield
    finally:
        outside.compile, outside._disable_dynamo = kept
        del outside._dynamo
        # Its parts, too: the real one would find them loaded, and so not as attributes of itself.
        for name in [name for name in sys.modules if name == _COMPILER or name.startswith(f"{_COMPILER}.")]:
            del sys.modules[name]


def stay_alone() -> None:
    """For a process that never spreads a model over several: nothing is imported then of what that takes."""
    torch.distributed.is_available = lambda: False
