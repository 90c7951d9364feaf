"""Choosing tokens: all rows of a step at once, each by its own request's settings and nothing else.

Invariant: a row's token depends on its logits, its request and how many tokens it already has. Its random
number comes from (seed, position), not from a shared stream, so company and preemption change nothing.
"""

import hashlib
from collections.abc import Sequence as Rows
from dataclasses import dataclass

import numpy as np
import torch

from onebase_server.engine.request import SamplingParams, TokenLogprobs
from onebase_server.engine.sequence import Sequence


@dataclass(frozen=True)
class Choice:
    """A row's chosen token, with logprobs if they were asked for."""

    token: int
    logprobs: TokenLogprobs | None = None


def sample(logits: torch.Tensor, sequences: Rows[Sequence]) -> list[Choice]:
    """Choose a next token for each of `sequences` from its row of `logits` [n, vocab]."""
    # The common case needs no float32 copy of a [n, vocab] matrix: argmax is exact in any dtype.
    if all(_is_plain_greedy(s) for s in sequences):
        return [Choice(token) for token in logits.argmax(-1).tolist()]
    scores = logits.float()
    raw = scores
    if any(_changes_scores(s) for s in sequences):
        scores = scores.clone()
        for row, sequence in enumerate(sequences):
            _apply_penalties(scores[row], sequence)
    chosen = _choose(scores, [s.request.sampling for s in sequences], [_uniform(s) for s in sequences])
    tokens = chosen.tolist()
    wanted = [row for row, s in enumerate(sequences) if s.request.sampling.logprobs is not None]
    found: dict[int, TokenLogprobs] = {}
    if wanted:
        tops = [sequences[row].request.sampling.logprobs or 0 for row in wanted]
        described = describe(raw[wanted], [tokens[row] for row in wanted], tops)
        found = dict(zip(wanted, described, strict=True))
    return [Choice(token, found.get(row)) for row, token in enumerate(tokens)]


def describe(logits: torch.Tensor, tokens: Rows[int], tops: Rows[int]) -> list[TokenLogprobs]:
    """Log-probabilities of `tokens`, one for each row of `logits` [n, vocab], and of each row's `tops` best."""
    logprobs = logits.float().log_softmax(-1)
    picked = logprobs.gather(1, torch.tensor(tokens, device=logits.device)[:, None])
    ranks = (logprobs > picked).sum(-1) + 1
    values, indices = logprobs.topk(min(max(tops, default=0), logprobs.shape[-1]), dim=-1)
    return [
        TokenLogprobs(token, logprob, rank, tuple(zip(best[:top], value[:top], strict=True)))
        for token, logprob, rank, best, value, top in zip(
            tokens, picked[:, 0].tolist(), ranks.tolist(), indices.tolist(), values.tolist(), tops, strict=True
        )
    ]


def _is_plain_greedy(sequence: Sequence) -> bool:
    sampling = sequence.request.sampling
    return sampling.temperature == 0 and sampling.logprobs is None and not _changes_scores(sequence)


def _changes_scores(sequence: Sequence) -> bool:
    sampling = sequence.request.sampling
    return bool(
        sampling.logit_bias
        or sampling.repetition_penalty != 1
        or sampling.presence_penalty
        or sampling.frequency_penalty
        or sequence.generated < sampling.min_tokens
    )


def _apply_penalties(scores: torch.Tensor, sequence: Sequence) -> None:
    """Change one row in place, as vLLM does: repetition over prompt and output, the other two over the output."""
    sampling = sequence.request.sampling
    vocab = scores.shape[0]
    if sampling.repetition_penalty != 1:
        seen = torch.tensor(sorted({t for t in sequence.tokens if t < vocab}), device=scores.device)
        values = scores[seen]
        penalty = sampling.repetition_penalty
        scores[seen] = torch.where(values > 0, values / penalty, values * penalty)
    if sampling.presence_penalty or sampling.frequency_penalty:
        output = torch.tensor(sequence.tokens[sequence.prompt_tokens :], dtype=torch.int64, device=scores.device)
        counts = torch.bincount(output, minlength=vocab)
        scores -= sampling.frequency_penalty * counts + sampling.presence_penalty * (counts > 0)
    for token, bias in sampling.logit_bias.items():
        scores[token] += bias
    if sequence.generated < sampling.min_tokens:
        scores[sorted(t for t in sequence.stop_tokens if t < vocab)] = float("-inf")


def _uniform(sequence: Sequence) -> float:
    """A number in [0, 1) from the request's seed (else its id) and its position in the output."""
    sampling = sequence.request.sampling
    source = f"seed {sampling.seed}" if sampling.seed is not None else f"id {sequence.request.id}"
    digest = hashlib.blake2b(f"{source} {sequence.generated}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) / (1 << 53)


def _choose(scores: torch.Tensor, settings: Rows[SamplingParams], uniforms: Rows[float]) -> torch.Tensor:
    """One token for each row: greedy where the temperature is 0, else by inverting the filtered distribution's
    cumulative sum, most likely token first."""
    greedy = scores.argmax(-1)
    drawn = [row for row, s in enumerate(settings) if s.temperature > 0]
    if not drawn:
        return greedy
    device = scores.device

    def column(values: list[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float32, device=device)[:, None]

    chosen = [settings[row] for row in drawn]
    rows = scores[drawn] / column([s.temperature for s in chosen])
    ordered, order = rows.sort(-1, descending=True, stable=True)
    probabilities = ordered.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    keep = before < column([s.top_p for s in chosen])
    vocab = rows.shape[-1]
    limits = torch.tensor([s.top_k or vocab for s in chosen], device=device)[:, None]
    keep &= torch.arange(vocab, device=device)[None] < limits
    keep &= probabilities >= column([s.min_p for s in chosen]) * probabilities[:, :1]
    keep[:, 0] = True
    kept = (probabilities * keep).double().cumsum(-1)
    points = torch.tensor(np.array([uniforms[row] for row in drawn]), device=device)[:, None] * kept[:, -1:]
    places = torch.searchsorted(kept, points, right=True).clamp(max=vocab - 1)
    greedy[drawn] = order.gather(1, places)[:, 0]
    return greedy
