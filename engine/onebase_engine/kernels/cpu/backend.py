"""All that CPUs have for a served model, under the names of `Kernels`."""

from collections.abc import Sequence
from typing import Any

from onebase_engine.kernels.bitsandbytes_import import Linear4bit
from onebase_engine.kernels.cpu.adapter_kernels import (
    PAIRED_COLUMNS,
    TILE_ROWS,
    TRANSPOSED_DOWN,
    add_bottleneck,
    add_low_rank,
    affine_rows,
    attend,
    attention_items,
    write_kv,
)
from onebase_engine.kernels.cpu.fused_decoder import fuse
from onebase_engine.kernels.cpu.grouped import GroupedLinear
from onebase_engine.kernels.cpu.packed import can_be_one, packable
from onebase_engine.kernels.cpu.screen import Screen
from onebase_engine.kernels.interface import Grouped
from onebase_engine.kernels.reference import backend as reference

__all__ = [
    "CAPTURED",
    "PAIRED_COLUMNS",
    "TILE_ROWS",
    "TRANSPOSED_DOWN",
    "add_bottleneck",
    "add_low_rank",
    "affine_rows",
    "attend",
    "attention_items",
    "fuse",
    "group",
    "screen",
    "write_kv",
]

CAPTURED = False


def group(modules: Sequence[Any]) -> Grouped:
    """See `Kernels.group`."""
    packed = all(isinstance(module, Linear4bit) and packable(module) for module in modules)
    return GroupedLinear(modules) if packed and can_be_one(modules) else reference.group(modules)


def screen(head: Any) -> Screen | None:
    """See `Kernels.screen`."""
    return Screen(head) if Screen.fits(head) else None
