"""One step's flat batch as the model sees it: tokens of many sequences in a row, and whose they are.

Plain arrays on the host; a kernel that lives elsewhere moves what it needs.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Traits:
    """What kinds of changes resident adapters make, [slots] bool each: a step asks once, not at every site."""

    affine: np.ndarray
    bottleneck: np.ndarray

    @classmethod
    def none(cls, slots: int) -> "Traits":
        return cls(np.zeros(slots, np.bool_), np.zeros(slots, np.bool_))


@dataclass(frozen=True)
class Owners:
    """Which adapter each of some rows belongs to."""

    slots: np.ndarray
    """[rows] int32: the resident adapter; 0 is none."""
    tiles: np.ndarray
    """The same as `low_rank_tiles` arranges it; empty where no row has an adapter."""
    affine: bool = False
    """Whether any row's adapter has Rescale or Shift."""
    bottleneck: bool = False
    """Whether any row's adapter has Bottleneck."""


@dataclass(frozen=True)
class Batch:
    """T tokens of S sequences, sequence by sequence, in ascending positions."""

    token_ids: torch.Tensor
    """[T] int64, on the model's device."""
    positions: np.ndarray
    """[T] int64: place in its sequence."""
    visible: np.ndarray
    """[T] int64: the last position that it attends to; its own in a decoder, its sequence's last in an encoder."""
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
    virtual_rows: np.ndarray
    """[v] int64: the rows of T that are learned embeddings; their `token_ids` mean nothing."""
    virtual_indices: np.ndarray
    """[v] int64: which of their adapter's virtual tokens they are."""
    items: np.ndarray
    """As the kernels' `attention_items` makes them."""


@dataclass(frozen=True)
class Chunk:
    """Consecutive tokens of one sequence, for one forward pass."""

    tokens: Sequence[int]
    start: int
    """Position of the first."""
    blocks: Sequence[int]
    """The sequence's cache blocks from its position 0 on, enough for the last of `tokens`."""
    slot: int = 0
    """The resident adapter; 0 is none."""
    sample: bool = True
    """Whether the logits after the last token are wanted."""
    all_logits: bool = False
    """Whether the logits after every token are wanted."""


class Context:
    """What the model's hooked modules share: the batch that is running. One for each served model."""

    batch: Batch
    head_input: torch.Tensor
    """What the LM head was given: the last hidden states [n, hidden] of the sample rows."""
