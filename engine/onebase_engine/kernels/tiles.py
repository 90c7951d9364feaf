"""How a batch is cut for the kernels: rows of one adapter together, query tokens of one sequence together."""

import numpy as np

QUERY_TOKENS = 16
"""Query tokens in a tile, at most; they share each block's load."""


def low_rank_tiles(slots: np.ndarray, tile: int) -> np.ndarray:
    """Group a batch's tokens by slot: [n, 1 + tile] int32: slot, then token indices, -1 where there are fewer.

    `slots` [T] int32, the slot of each token. Slot 0 has no tiles.
    """
    tokens = np.flatnonzero(slots)
    if not len(tokens):
        return np.empty((0, 1 + tile), np.int32)
    tokens = tokens[np.argsort(slots[tokens], kind="stable")]
    kinds = slots[tokens]
    starts = np.flatnonzero(np.diff(kinds, prepend=-1))
    lengths = np.diff(starts, append=len(tokens))
    tiles_each = (lengths + tile - 1) // tile
    tiles = np.full((int(tiles_each.sum()), 1 + tile), -1, np.int32)
    tile_starts = np.cumsum(tiles_each) - tiles_each
    within = np.arange(len(tokens)) - np.repeat(starts, lengths)
    rows = np.repeat(tile_starts, lengths) + within // tile
    tiles[rows, 0] = kinds
    tiles[rows, 1 + within % tile] = tokens
    return tiles


def query_tiles(query_start: np.ndarray) -> np.ndarray:
    """[n, 3] int32: sequence, first token, tokens (at most QUERY_TOKENS).

    `query_start` [S + 1]: sequence s has the tokens query_start[s]..query_start[s+1].
    """
    counts = np.diff(query_start)
    if counts.max(initial=0) == 1:
        sequences = np.arange(len(counts), dtype=np.int32)
        return np.stack([sequences, query_start[:-1].astype(np.int32), np.ones_like(sequences)], axis=1)
    tiles = [
        (s, first, min(QUERY_TOKENS, query_start[s + 1] - first))
        for s in range(len(counts))
        for first in range(query_start[s], query_start[s + 1], QUERY_TOKENS)
    ]
    return np.array(tiles, np.int32)
