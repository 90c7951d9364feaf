"""Choosing tokens: all rows of a step at once, each by its own request's settings and nothing else.

Invariant: a row's token depends on its logits, its request and how many tokens it already has. Its random
numbers come from (seed, position), not from a shared stream, so company and preemption change nothing.
"""

import hashlib
from collections.abc import Sequence as Rows
from dataclasses import dataclass

import numpy as np
import torch

from onebase_engine.kernels.gumbel_noise import LEAST_TEMPERATURE, Noise
from onebase_engine.request import SamplingParams, TokenLogprobs
from onebase_engine.runner.lm_head import Scores
from onebase_engine.scheduling.sequence import Sequence

_SORTED = (256, 4096)
"""How many of the most likely tokens are sorted, before all of them are."""


@dataclass(frozen=True)
class Choice:
    """A row's chosen token, with logprobs if they were asked for."""

    token: int
    """-1 where no token can be chosen: the logits are not finite."""
    logprobs: TokenLogprobs | None = None


def sample(scores: Scores, rows: Rows[int], sequences: Rows[Sequence]) -> list[Choice]:
    """Choose a next token for each of `sequences`, whose scores are in the row of the same place."""
    tokens = [-1] * len(sequences)
    edited = [place for place, sequence in enumerate(sequences) if _edits(sequence)]
    plain = sorted({*range(len(sequences))} - {*edited}) if edited else range(len(sequences))
    if plain:
        best = scores.best([rows[p] for p in plain], _noise([sequences[p] for p in plain]))
        for place, token in zip(plain, best, strict=True):
            tokens[place] = token
    watched = [p for p, s in enumerate(sequences) if s.request.sampling.logprobs is not None]
    needed = sorted({*watched, *edited})
    if not needed:
        return [Choice(token) for token in tokens]
    logits = scores.logits([rows[p] for p in needed]).float()
    row_of = {place: row for row, place in enumerate(needed)}
    if edited:
        raw = logits[[row_of[p] for p in edited]]
        for place, token in zip(edited, _choose(raw, [sequences[p] for p in edited]), strict=True):
            tokens[place] = token
    found: dict[int, TokenLogprobs] = {}
    watched = [p for p in watched if tokens[p] >= 0]
    if watched:
        tops = [sequences[p].request.sampling.logprobs or 0 for p in watched]
        described = describe(logits[[row_of[p] for p in watched]], [tokens[p] for p in watched], tops)
        found = dict(zip(watched, described, strict=True))
    return [Choice(token, found.get(place)) for place, token in enumerate(tokens)]


def _choose(raw: torch.Tensor, sequences: Rows[Sequence]) -> list[int]:
    """Choose from raw logits [n, vocab], float32; -1 where they are not finite."""
    scores = raw
    if any(_changes_scores(s) for s in sequences):
        scores = raw.clone()
        for row, sequence in enumerate(sequences):
            _apply_penalties(scores[row], sequence)
    chosen = torch.zeros(len(sequences), dtype=torch.int64, device=scores.device)
    filtered = [row for row, sequence in enumerate(sequences) if _filters(sequence.request.sampling)]
    others = [row for row, sequence in enumerate(sequences) if not _filters(sequence.request.sampling)]
    if others:
        noise = _noise([sequences[row] for row in others])
        chosen[others] = (scores[others] if noise is None else noise.over(scores[others])).argmax(-1)
    if filtered:
        some = [sequences[row] for row in filtered]
        chosen[filtered] = torch.tensor(_filtered(scores[filtered], some), device=scores.device)
    # Not the penalised scores: those are -inf on purpose here and there.
    tokens: list[int] = torch.where(raw.max(-1).values.isfinite(), chosen, -1).tolist()
    return tokens


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


def _edits(sequence: Sequence) -> bool:
    """Whether anything but temperature stands between a row's logits and its token."""
    return _changes_scores(sequence) or _filters(sequence.request.sampling)


def _filters(sampling: SamplingParams) -> bool:
    return sampling.temperature > 0 and (sampling.top_p < 1 or sampling.top_k > 0 or sampling.min_p > 0)


def _changes_scores(sequence: Sequence) -> bool:
    sampling = sequence.request.sampling
    return bool(
        sampling.logit_bias
        or sampling.repetition_penalty != 1
        or sampling.presence_penalty
        or sampling.frequency_penalty
        or sequence.generated < sampling.min_tokens
        or sequence.grammar
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
    if sampling.logit_bias:
        biased = torch.tensor(list(sampling.logit_bias), device=scores.device)
        scores[biased] += torch.tensor(list(sampling.logit_bias.values()), dtype=scores.dtype, device=scores.device)
    grammar = sequence.grammar
    if sequence.generated < sampling.min_tokens and not (grammar and grammar.over):
        scores[sorted(t for t in sequence.stop_tokens if t < vocab)] = float("-inf")
    if grammar is not None:
        bits = np.frombuffer(grammar.allowed(), np.uint8)
        allowed = np.unpackbits(bits, count=vocab, bitorder="little")
        scores.masked_fill_(torch.from_numpy(allowed == 0).to(scores.device), float("-inf"))


def _noise(sequences: Rows[Sequence]) -> Noise | None:
    """The noise that their tokens are drawn with; None where all take the best."""
    temperatures = [sequence.request.sampling.temperature for sequence in sequences]
    if not any(temperatures):
        return None
    return Noise.of(temperatures, [_seed(s) if t > 0 else 0 for s, t in zip(sequences, temperatures, strict=True)])


def _seed(sequence: Sequence) -> int:
    """64 bits from the request's seed (else its id) and its position in the output."""
    sampling = sequence.request.sampling
    source = f"seed {sampling.seed}" if sampling.seed is not None else f"id {sequence.request.id}"
    digest = hashlib.blake2b(f"{source} {sequence.generated}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def _filtered(scores: torch.Tensor, sequences: Rows[Sequence]) -> list[int]:
    """Draw from scores [n, vocab] what min_p, then top_k, then top_p of the rest leave, as vLLM applies them.

    Only the most likely are sorted as long as a row's filters are sure to end among them: sorting a whole
    vocabulary costs more than the rest of a small model's step. How many is a row's own matter, because the
    order of equals may depend on it.
    """
    settings = [sequence.request.sampling for sequence in sequences]
    temperatures = torch.tensor([[max(s.temperature, LEAST_TEMPERATURE)] for s in settings])
    probabilities = (scores / temperatures.to(scores.device)).softmax(-1)
    vocab = probabilities.shape[-1]
    tokens = [-1] * len(settings)
    left = list(range(len(settings)))
    for size in (*(s for s in _SORTED if s < vocab), vocab):
        rows = [r for r in left if min(settings[r].top_k, vocab) <= size]
        if not rows:
            continue
        kept, order = _filter(probabilities[rows], [settings[r] for r in rows], size)
        noise = Noise.of([1.0] * len(rows), [_seed(sequences[r]) for r in rows])
        places = noise.best_of(kept.log(), order)
        ended: list[bool] = (kept[:, -1] == 0).tolist()
        chosen: list[int] = order.gather(1, places[:, None])[:, 0].tolist()
        for row, token, over in zip(rows, chosen, ended, strict=True):
            if over or size == vocab:
                tokens[row] = token
                left.remove(row)
    return tokens


def _filter(
    probabilities: torch.Tensor, settings: Rows[SamplingParams], size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The `size` largest probabilities, filtered ones set to 0, most likely first, and their token ids; [n, size]
    each. No top_k is above `size`."""
    device = probabilities.device
    top_p = torch.tensor([[s.top_p] for s in settings], device=device)
    top_k = torch.tensor([[s.top_k or probabilities.shape[-1]] for s in settings], device=device)
    min_p = torch.tensor([[s.min_p] for s in settings], device=device)
    ordered, order = probabilities.topk(size, dim=-1)
    floor = min_p * ordered[:, :1]
    ranks = torch.arange(size, device=device)[None]
    kept = ordered * ((ranks < top_k) & (ordered >= floor))
    # Of a nucleus that top_k does not bound, some may lie beyond the largest.
    everything = (probabilities * (probabilities >= floor)).sum(-1, keepdim=True)
    mass = torch.where(top_k > size, everything, kept.sum(-1, keepdim=True))
    inside = (kept.cumsum(-1) - kept < top_p * mass) | (top_p >= 1)
    inside[:, 0] = True
    return kept * inside, order
