"""All that CPUs have for a served model, under the names of `Kernels`."""

from typing import Any

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
from onebase_engine.kernels.cpu.screen import Screen

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
    "screen",
    "write_kv",
]

CAPTURED = False


def screen(head: Any) -> Screen | None:
    """See `Kernels.screen`."""
    return Screen(head) if Screen.fits(head) else None
