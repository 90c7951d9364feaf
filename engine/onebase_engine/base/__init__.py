"""The frozen base model: where it comes from, how it is quantised, which linear sites adapters may touch.

Names load on first use: the API process asks only where a model is, and must not pay for torch to learn it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onebase_adapters.base_shape import BaseShape, Site
    from onebase_engine.base.base_spec import DEFAULT_BASE, BaseSpec
    from onebase_engine.base.catalog import fetch_base
    from onebase_engine.base.describe import describe_base
    from onebase_engine.base.load_base import LoadedBase, load_base

__all__ = [
    "DEFAULT_BASE",
    "BaseShape",
    "BaseSpec",
    "LoadedBase",
    "Site",
    "describe_base",
    "fetch_base",
    "load_base",
]

_HOME = {
    "DEFAULT_BASE": "catalog",
    "fetch_base": "catalog",
    "LoadedBase": "load",
    "load_base": "load",
    "BaseShape": "shape",
    "Site": "shape",
    "describe_base": "shape",
    "BaseSpec": "spec",
}


if not TYPE_CHECKING:  # a type checker should see the names above and no others

    def __getattr__(name: str) -> Any:
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
