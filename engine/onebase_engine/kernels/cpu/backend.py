"""The CPU kernels under the names of the contract: tensors in, addresses to numba. bfloat16 only."""

from onebase_engine.kernels.cpu import lowrank

TILE_ROWS = lowrank.TILE
PAIRED_COLUMNS = lowrank.GROUP
TRANSPOSED_DOWN = True
