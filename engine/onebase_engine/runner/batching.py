"""Laying chunks of many sequences out as the one flat batch that the model runs."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from onebase_engine.kernels.adapter_interface import AdapterKernels
from onebase_engine.kernels.batch import BLOCK, Batch, Owners, Traits
from onebase_engine.kernels.tiles import low_rank_tiles


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
    wanted: int = 1
    """After how many of the last tokens the scores are wanted."""
    sequence: str = ""
    """Whose they are. An encoder-decoder asks, and next:"""
    prompt: int = 0
    """How many of the sequence's tokens are the encoder's, virtual ones included."""


class Context:
    """The running batch, as the model's hooked modules share it. One for each served model."""

    batch: Batch
    head_input: torch.Tensor
    """What the LM head was given: the last hidden states [n, hidden] of the sample rows."""

    def owners(self, rows: int, *, head: bool) -> Owners:
        """The owners of the rows that a linear module is given; `head`: it is the LM head."""
        return self.batch.head_owners if head else self.batch.owners


def make_batch(
    chunks: Sequence[Chunk],
    kernels: AdapterKernels,
    traits: Traits,
    device: torch.device,
    *,
    vocab: int,
    kv_heads: int,
    encoder: bool = False,
) -> Batch:
    """Flat arrays of at least one chunk; ids from `vocab` upwards are virtual tokens. In an `encoder` a token sees
    those after it in its chunk, too."""
    lengths = [len(chunk.tokens) for chunk in chunks]
    query_start = np.zeros(len(chunks) + 1, np.int64)
    np.cumsum(lengths, out=query_start[1:])
    total = int(query_start[-1])
    token_ids = np.fromiter((token for chunk in chunks for token in chunk.tokens), np.int64, total)
    virtual_rows = np.flatnonzero(token_ids >= vocab)
    virtual_indices = token_ids[virtual_rows] - vocab
    token_ids[virtual_rows] = 0
    tables = np.zeros((len(chunks), max(len(chunk.blocks) for chunk in chunks)), np.int32)
    for row, chunk in enumerate(chunks):
        tables[row, : len(chunk.blocks)] = chunk.blocks
    counts = np.asarray(lengths)
    within = np.arange(total) - np.repeat(query_start[:-1], counts)
    positions = within + np.repeat([chunk.start for chunk in chunks], counts)
    visible = np.repeat(positions[query_start[1:] - 1], counts) if encoder else positions
    rows = np.repeat(np.arange(len(chunks)), counts)
    slots = np.repeat(np.array([chunk.slot for chunk in chunks], np.int32), counts)
    wanted: list[int] = []
    for end, chunk in zip(query_start[1:].tolist(), chunks, strict=True):
        wanted.extend(range(end - chunk.wanted, end))

    return Batch(
        token_ids=torch.from_numpy(token_ids).to(device),
        positions=positions,
        visible=visible,
        owners=make_owners(slots, kernels, traits),
        head_owners=make_owners(slots[wanted], kernels, traits),
        query_start=query_start,
        tables=tables,
        cache_slots=tables[rows, positions // BLOCK].astype(np.int64) * BLOCK + positions % BLOCK,
        sample_rows=torch.tensor(wanted, dtype=torch.int64, device=device),
        virtual_rows=virtual_rows,
        virtual_indices=virtual_indices,
        items=kernels.attention_items(query_start, visible, kv_heads),
    )


def make_owners(slots: np.ndarray, kernels: AdapterKernels, traits: Traits) -> Owners:
    """Group rows by the adapters in their `slots` [rows] int32."""
    return Owners(
        slots,
        low_rank_tiles(slots, kernels.TILE_ROWS),
        affine=bool(traits.affine[slots].any()),
        bottleneck=bool(traits.bottleneck[slots].any()),
    )
