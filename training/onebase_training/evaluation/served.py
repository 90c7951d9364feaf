"""Whole sequences through the model as it is served: what the engine computes, without its scheduling.

Sequences of one call share the forward passes; pages are handed out anew for each call.
"""

from collections.abc import Sequence
from itertools import count

import torch

from onebase_engine.kernels.batch import BLOCK
from onebase_engine.runner.batched_model import ServedModel
from onebase_engine.runner.batching import Chunk
from onebase_engine.runner.lm_head import Scores

_STEP_TOKENS = 512
"""Of a forward pass, as the engine's default."""


class ServedRows:
    """A served model with one adapter (or none), fed by hand."""

    def __init__(self, model: ServedModel, slot: int, prefix: int) -> None:
        """`prefix`: how many of a sequence's first tokens are a learned prefix, which has no rows."""
        self._model = model
        self._slot = slot
        self._prefix = prefix

    @property
    def vocab(self) -> int:
        """Where the ids of virtual tokens begin."""
        return self._model.shape.vocab

    @staticmethod
    def blocks_for(lengths: Sequence[int]) -> int:
        """Pages for sequences of so many tokens each."""
        return sum(-(-length // BLOCK) for length in lengths)

    def logits(self, tokens: Sequence[int], places: Sequence[int]) -> torch.Tensor:
        """float32 [places, vocab]: what follows each of the places (of tokens, the prefix's counted)."""
        parts = [scores.logits(rows).float() for scores, rows in self._read(tokens, places)]
        return torch.cat(parts)

    def hidden(self, tokens: Sequence[int], places: Sequence[int]) -> torch.Tensor:
        """float32 [places, hidden], after the last norm."""
        return torch.cat([scores.hidden(rows).float() for scores, rows in self._read(tokens, places)])

    def _read(self, tokens: Sequence[int], places: Sequence[int]) -> list[tuple[Scores, list[int]]]:
        """Scores of each step with its rows of `places`. An encoder's sequence goes in one step."""
        blocks = list(range(self.blocks_for([len(tokens)])))
        step = len(tokens) if self._model.shape.encoder else _STEP_TOKENS
        found = []
        for start in range(0, len(tokens), step):
            part = list(tokens[start : start + step])
            scores = self._model.forward([Chunk(part, start, blocks, self._slot, all_logits=True)])
            first = max(start, self._prefix)
            rows = [place - first for place in places if first <= place < start + len(part)]
            if rows:
                found.append((scores, rows))
        return found

    def greedy(
        self, prompts: Sequence[Sequence[int]], limits: Sequence[int], ends: frozenset[int]
    ) -> list[list[int]]:
        """What the model writes after each prompt, together, up to (not with) one of `ends`."""
        pages = count()
        blocks = [
            [next(pages) for _ in range(self.blocks_for([len(prompt) + limit]))]
            for prompt, limit in zip(prompts, limits, strict=True)
        ]
        outputs: list[list[int]] = [[] for _ in prompts]
        last = [self._prefill(prompt, blocks[number]) for number, prompt in enumerate(prompts)]
        running = list(range(len(prompts)))
        while True:
            for number in running:
                if last[number] not in ends:
                    outputs[number].append(last[number])
            running = [n for n in running if last[n] not in ends and len(outputs[n]) < limits[n]]
            if not running:
                return outputs
            chunks = [
                Chunk([last[n]], len(prompts[n]) + len(outputs[n]) - 1, blocks[n], self._slot) for n in running
            ]
            best = self._model.forward(chunks).best(range(len(running)))
            for number, token in zip(running, best, strict=True):
                last[number] = token

    def _prefill(self, prompt: Sequence[int], blocks: list[int]) -> int:
        """Compute a prompt; the first token that follows it."""
        for start in range(0, len(prompt), _STEP_TOKENS):
            part = list(prompt[start : start + _STEP_TOKENS])
            scores = self._model.forward([Chunk(part, start, blocks, self._slot)])
        return scores.best([0])[0]
