"""All that CPUs have for a served model, under the names of `Kernels`."""

from typing import Any

from onebase_engine.kernels.cpu.adapter_kernels import (
    PAIRED_COLUMNS as PAIRED_COLUMNS,
)
from onebase_engine.kernels.cpu.adapter_kernels import (
    TILE_ROWS as TILE_ROWS,
)
from onebase_engine.kernels.cpu.adapter_kernels import (
    TRANSPOSED_DOWN as TRANSPOSED_DOWN,
)
from onebase_engine.kernels.cpu.adapter_kernels import (
    add_bottleneck as add_bottleneck,
)
from onebase_engine.kernels.cpu.adapter_kernels import (
    add_low_rank as add_low_rank,
)
from onebase_engine.kernels.cpu.adapter_kernels import (
    affine_rows as affine_rows,
)
from onebase_engine.kernels.cpu.adapter_kernels import (
    attend as attend,
)
from onebase_engine.kernels.cpu.adapter_kernels import (
    attention_items as attention_items,
)
from onebase_engine.kernels.cpu.adapter_kernels import (
    write_kv as write_kv,
)
from onebase_engine.kernels.cpu.fused_decoder import fuse as fuse
from onebase_engine.kernels.cpu.screen import Screen

CAPTURED = False


def screen(head: Any) -> Screen | None:
    """See `Kernels.screen`."""
    return Screen(head) if Screen.fits(head) else None
