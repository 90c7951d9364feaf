"""Driving a ServedModel without an engine: prompts in, logits or greedy tokens out, pages from a counter."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import torch

from onebase_adapters.lowering.lower import load_adapter
from onebase_engine.kernels.batch import BLOCK
from onebase_engine.runner.batched_model import Chunk, ServedModel


@dataclass
class Stream:
    """A sequence that is being computed."""

    tokens: list[int]
    slot: int = 0
    computed: int = 0
    blocks: list[int] = field(default_factory=list)
    prefix: int = 0
    """Of its first tokens, how many are a learned prefix, which has no logits."""


class Feeder:
    """Computes streams through a model, any of them together, in chunks of any size."""

    def __init__(self, served: ServedModel) -> None:
        self.served = served
        self._pages = count()

    def grow(self, stream: Stream) -> None:
        """Give a stream the pages for all of its tokens."""
        while len(stream.blocks) * BLOCK < len(stream.tokens):
            stream.blocks.append(next(self._pages))

    def logits(self, streams: Sequence[Stream], sizes: Sequence[int] = (1 << 30,)) -> list[torch.Tensor]:
        """Compute what is left of all streams, in steps: in each, every stream advances by the next of `sizes`
        (used in turn). The logits after each token computed, [tokens, vocab] for each stream, prefixes left out."""
        found: list[list[torch.Tensor]] = [[] for _ in streams]
        turn = 0
        while any(stream.computed < len(stream.tokens) for stream in streams):
            chunks, rows = [], []
            for index, stream in enumerate(streams):
                if stream.computed == len(stream.tokens):
                    continue
                self.grow(stream)
                part = stream.tokens[stream.computed :][: sizes[turn % len(sizes)]]
                turn += 1
                chunks.append(Chunk(part, stream.computed, stream.blocks, stream.slot, wanted=len(part)))
                rows.append((index, max(0, stream.computed + len(part) - max(stream.computed, stream.prefix))))
                stream.computed += len(part)
            scores = self.served.forward(chunks)
            total = sum(length for _, length in rows)
            parts = scores.logits(range(total)).split([length for _, length in rows])
            for (index, _), part in zip(rows, parts, strict=True):
                found[index].append(part)
        return [torch.cat(parts) for parts in found]

    def greedy(self, streams: Sequence[Stream], tokens: int) -> list[list[int]]:
        """Continue all streams together by so many greedy tokens each."""
        first = [stream.tokens[:] for stream in streams]
        for _ in range(tokens):
            for stream in streams:
                self.grow(stream)
            scores = self.served.forward(
                [Chunk(s.tokens[s.computed :], s.computed, s.blocks, s.slot) for s in streams]
            )
            for stream, token in zip(streams, scores.best(range(len(streams))), strict=True):
                stream.computed = len(stream.tokens)
                stream.tokens.append(token)
        return [stream.tokens[len(start) :] for stream, start in zip(streams, first, strict=True)]


def put(served: ServedModel, folder: Path) -> int:
    """Make a stored adapter resident; returns its slot."""
    return served.put(load_adapter(folder, folder.name, served.shape, served.weights))
