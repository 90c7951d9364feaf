"""The frozen base model: where it comes from, how it is quantised, which linear sites adapters may touch."""

from onebase_adapters.base.catalog import DEFAULT_BASE, fetch_base
from onebase_adapters.base.load import LoadedBase, load_base
from onebase_adapters.base.shape import BaseShape, Site, describe_base
from onebase_adapters.base.spec import BaseSpec

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
