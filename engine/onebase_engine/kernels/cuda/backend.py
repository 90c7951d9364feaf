"""All that GPUs have for a served model, under the names of `Kernels`."""

from typing import Any

from onebase_engine.kernels.cuda.adapter_kernels import (
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
from onebase_engine.kernels.cuda.fused_decoder import fuse
from onebase_engine.kernels.reference.backend import group

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

CAPTURED = True


def screen(head: Any) -> None:
    """All logits are quicker than a second look at some."""
