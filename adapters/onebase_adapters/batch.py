"""One step's flat batch as the model sees it: tokens of many sequences in a row, and whose they are.

Plain arrays on the host; a kernel that lives elsewhere moves what it needs.
"""

from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Owners:
    """Which adapter each of some rows belongs to."""

    slots: np.ndarray
    """[rows] int32: the resident adapter; 0 is none."""
    tiles: np.ndarray
    """The same as `low_rank_tiles` arranges it; empty where no row has an adapter."""


@dataclass(frozen=True)
class Batch:
    """T tokens of S sequences, sequence by sequence, in ascending positions."""

    token_ids: torch.Tensor
    """[T] int64, on the model's device."""
    positions: np.ndarray
    """[T] int64: place in its sequence."""
    owners: Owners
    """Of the T tokens."""
    head_owners: Owners
    """Of the `sample_rows`, which are all that the LM head sees."""
    query_start: np.ndarray
    """[S + 1] int64: sequence s has the tokens query_start[s] .. query_start[s + 1]."""
    tables: np.ndarray
    """[S, most blocks] int32: cache blocks of each sequence."""
    cache_slots: np.ndarray
    """[T] int64: where the token's key and value go, block * BLOCK + offset."""
    sample_rows: torch.Tensor
    """[n] int64: the tokens whose next token is wanted."""
    items: np.ndarray
    """As the kernels' `attention_items` makes them."""


class Context:
    """What the model's hooked modules share: the batch that is running. One for each served model."""

    batch: Batch
