"""What is read off a prompt beside its next token: logprobs of its tokens, hidden states for heads and embeddings.

Invariant: what a step computes has rows for the last `wanted` tokens of each piece of work, and none for a learned
prefix. No token whose row is wanted is found in the prefix cache, so each passes here exactly once; those that pass
again after a preemption are known by how many have been taken.
"""

from dataclasses import dataclass, field

import torch

from onebase_engine.request import Output
from onebase_engine.runner.adapter_slots import AdapterSlots
from onebase_engine.runner.classifier_heads import pool, probabilities
from onebase_engine.runner.lm_head import Scores
from onebase_engine.sampling.sampler import describe
from onebase_engine.scheduling.scheduler import Plan, Work
from onebase_engine.scheduling.sequence import Sequence


@dataclass
class _Taken:
    """Hidden states so far: of the prompt's own tokens, or only of the last position."""

    hidden: list[torch.Tensor] = field(default_factory=list)
    count: int = 0


class PromptReader:
    """Keeps what the steps gave until the prompt is done."""

    def __init__(self, model: AdapterSlots) -> None:
        self._model = model
        self._taken: dict[str, _Taken] = {}

    def wanted(self, work: Work) -> int:
        """After how many of the work's last tokens the scores are wanted."""
        sequence = work.sequence
        if sequence.request.task == "score":
            first = sequence.scored[0] - 1
        elif self._wants_every_row(sequence):
            first = sequence.layout.prefix
        else:
            return int(work.samples)
        return max(0, work.start + work.count - max(work.start, first))

    def read(self, plan: Plan, scores: Scores) -> list[int]:
        """Take what a step tells of prompts; returns the rows that next tokens are to be chosen from, in order."""
        row = 0
        sampled = []
        for work in plan.work:
            rows = self.wanted(work)
            row += rows
            if work.sequence.request.task in ("classify", "embed"):
                self._take_hidden(work, scores, row, rows)
            else:
                self._take_logprobs(work, scores, row, rows)
            if work.samples and work.sequence.request.task == "generate":
                sampled.append(row - 1)
        return sampled

    def conclude(self, sequence: Sequence) -> Output:
        """The answer for a prompt that is done."""
        if sequence.request.task == "score":
            return Output(
                sequence.request.id,
                prompt_logprobs=tuple(sequence.logprobs),
                cached_tokens=sequence.cached_tokens,
                finish_reason="stop",
            )
        hidden = torch.cat(self._taken[sequence.request.id].hidden)
        if sequence.request.task == "embed":
            vector = torch.nn.functional.normalize(pool(hidden, "mean"), dim=0)
            return Output(sequence.request.id, embedding=tuple(vector.tolist()), finish_reason="stop")
        head = self._model.head(sequence.slot)
        if head is None:
            why = "This adapter has no classification head."
            return Output(sequence.request.id, finish_reason="error", error=why, error_kind="adapter")
        found = tuple(tuple(row) for row in probabilities(head, hidden))
        return Output(sequence.request.id, probabilities=found, finish_reason="stop")

    def forget(self, sequence: Sequence) -> None:
        """Drop what was taken for a sequence that ends."""
        self._taken.pop(sequence.request.id, None)

    def _wants_every_row(self, sequence: Sequence) -> bool:
        """Whether what follows each of the prompt's tokens is wanted, not only what follows the last."""
        if sequence.generated or not sequence.reads_all:
            return False
        head = self._model.head(sequence.slot) if sequence.request.task == "classify" else None
        return head is None or head.kind == "token" or head.pooling != "last"

    def _take_logprobs(self, work: Work, scores: Scores, end: int, rows: int) -> None:
        """The row of position p predicts the token at p + 1. `end`: the row after the last."""
        sequence = work.sequence
        after = work.start + work.count
        new = [p for p in sequence.scored[len(sequence.logprobs) :] if after - rows < p <= after]
        if new:
            logits = scores.logits([end + p - 1 - after for p in new])
            tops = [sequence.request.sampling.prompt_logprobs or 0] * len(new)
            sequence.logprobs += describe(logits, [sequence.tokens[p] for p in new], tops)

    def _take_hidden(self, work: Work, scores: Scores, end: int, rows: int) -> None:
        if not rows:
            return
        taken = self._taken.setdefault(work.sequence.request.id, _Taken())
        if not self._wants_every_row(work.sequence):
            taken.hidden = [scores.hidden([end - 1])]
            return
        after = work.start + work.count
        new = [p for p in work.sequence.own[taken.count :] if after - rows <= p < after]
        if new:
            taken.hidden.append(scores.hidden([end + p - after for p in new]))
            taken.count += len(new)
