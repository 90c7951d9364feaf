"""Learned prefixes: keys and values that are written into a request's cache pages instead of being computed."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from onebase_adapters.primitives.instruction_set import KVPrefix
from onebase_adapters.primitives.lowered_adapter import LoweredAdapter
from onebase_engine.cache.kv_pages import PagedKV
from onebase_engine.kernels.batch import BLOCK
from onebase_engine.runner.batching import Chunk


class PrefixTable:
    """Resident prefixes by slot. Full pages of them are shared by an adapter's requests as any other prefix is."""

    def __init__(self, cache: PagedKV) -> None:
        self._cache = cache
        self._prefixes: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def put(self, slot: int, adapter: LoweredAdapter) -> None:
        """Make an adapter's prefix the slot's, if it has one."""
        if (prefix := adapter.one(KVPrefix)) is not None:
            like = self._cache.k[0]
            self._prefixes[slot] = (
                prefix.keys.to(like.device, like.dtype),
                prefix.values.to(like.device, like.dtype),
            )

    def clear(self, slot: int) -> None:
        """Forget the slot's prefix."""
        self._prefixes.pop(slot, None)

    def write(self, chunks: Sequence[Chunk]) -> list[Chunk]:
        """Write the chunks' prefix tokens into their pages; returns what is left to compute."""
        if not self._prefixes:
            return list(chunks)
        left = []
        for chunk in chunks:
            keys, values = self._prefixes.get(chunk.slot, (None, None))
            count = 0 if keys is None else min(max(keys.shape[1] - chunk.start, 0), len(chunk.tokens))
            if keys is not None and values is not None and count:
                positions = np.arange(chunk.start, chunk.start + count)
                slots = np.asarray(chunk.blocks)[positions // BLOCK] * BLOCK + positions % BLOCK
                span = slice(chunk.start, chunk.start + count)
                for layer in range(len(keys)):
                    self._cache.put(layer, keys[layer, span], values[layer, span], slots.astype(np.int64))
            if count < len(chunk.tokens):
                tokens = chunk.tokens[count:]
                wanted = min(chunk.wanted, len(tokens))
                left.append(replace(chunk, tokens=tokens, start=chunk.start + count, wanted=wanted))
        return left
