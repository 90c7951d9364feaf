"""Choosing tokens: all rows of a step at once, each by its own request's settings and nothing else.

Invariant: a row's token depends on its logits, its request and how many tokens it already has. Its random
number comes from (seed, position), not from a shared stream, so company and preemption change nothing.
"""

import hashlib
from collections.abc import Sequence as Rows
from dataclasses import dataclass

import numpy as np
import torch

from onebase_adapters.model.head import Scores
from onebase_server.engine.request import SamplingParams, TokenLogprobs
from onebase_server.engine.sequence import Sequence

_LEAST_TEMPERATURE = 1e-5
_SORTED = (256, 4096)
"""How many of the most likely tokens are sorted, before all of them are."""


@dataclass(frozen=True)
class Choice:
    """A row's chosen token, with logprobs if they were asked for."""

    token: int
    """-1 where no token can be chosen: the logits are not finite, or the request's grammar failed."""
    logprobs: TokenLogprobs | None = None


def sample(scores: Scores, rows: Rows[int], sequences: Rows[Sequence]) -> list[Choice]:
    """Choose a next token for each of `sequences`, whose scores are in the row of the same place."""
    tokens = [-1] * len(sequences)
    best = [place for place, sequence in enumerate(sequences) if _takes_best(sequence)]
    if best:
        for place, token in zip(best, scores.best([rows[p] for p in best]), strict=True):
            tokens[place] = token
    watched = [p for p, s in enumerate(sequences) if s.request.sampling.logprobs is not None]
    drawn = [place for place, sequence in enumerate(sequences) if not _takes_best(sequence)]
    needed = sorted({*watched, *drawn})
    if not needed:
        return [Choice(token) for token in tokens]
    logits = scores.logits([rows[p] for p in needed]).float()
    row_of = {place: row for row, place in enumerate(needed)}
    if drawn:
        raw = logits[[row_of[p] for p in drawn]]
        for place, token in zip(drawn, _draw(raw, [sequences[p] for p in drawn]), strict=True):
            tokens[place] = token
    found: dict[int, TokenLogprobs] = {}
    watched = [p for p in watched if tokens[p] >= 0]
    if watched:
        tops = [sequences[p].request.sampling.logprobs or 0 for p in watched]
        described = describe(logits[[row_of[p] for p in watched]], [tokens[p] for p in watched], tops)
        found = dict(zip(watched, described, strict=True))
    return [Choice(token, found.get(place)) for place, token in enumerate(tokens)]


def _draw(raw: torch.Tensor, sequences: Rows[Sequence]) -> list[int]:
    """Choose from raw logits [n, vocab], float32; -1 where they are not finite, or where a grammar failed."""
    scores = raw
    if any(_changes_scores(s) for s in sequences):
        scores = raw.clone()
        for row, sequence in enumerate(sequences):
            _apply_penalties(scores[row], sequence)
    chosen = _choose(scores, [s.request.sampling for s in sequences], [_uniform(s) for s in sequences])
    # Not the penalised scores: those are -inf on purpose here and there.
    tokens: list[int] = torch.where(raw.max(-1).values.isfinite(), chosen, -1).tolist()
    for row, sequence in enumerate(sequences):
        if sequence.grammar is not None and not sequence.grammar.take(tokens[row]):
            tokens[row] = -1
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


def _takes_best(sequence: Sequence) -> bool:
    return sequence.request.sampling.temperature == 0 and not _changes_scores(sequence)


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
    for token, bias in sampling.logit_bias.items():
        scores[token] += bias
    grammar = sequence.grammar
    if sequence.generated < sampling.min_tokens and not (grammar and grammar.over):
        scores[sorted(t for t in sequence.stop_tokens if t < vocab)] = float("-inf")
    if grammar is not None:
        bits = np.frombuffer(grammar.allowed(), np.uint8)
        allowed = np.unpackbits(bits, count=vocab, bitorder="little")
        scores.masked_fill_(torch.from_numpy(allowed == 0).to(scores.device), float("-inf"))


def _uniform(sequence: Sequence) -> float:
    """A number in [0, 1) from the request's seed (else its id) and its position in the output."""
    sampling = sequence.request.sampling
    source = f"seed {sampling.seed}" if sampling.seed is not None else f"id {sequence.request.id}"
    digest = hashlib.blake2b(f"{source} {sequence.generated}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) / (1 << 53)


def _choose(scores: torch.Tensor, settings: Rows[SamplingParams], uniforms: Rows[float]) -> torch.Tensor:
    """One token for each row: greedy where the temperature is 0, else drawn by inverting the cumulative sum of
    what the filters leave of its distribution."""
    tokens = scores.argmax(-1)
    filtered = [r for r, s in enumerate(settings) if s.temperature > 0 and _filters(s)]
    open_rows = [r for r, s in enumerate(settings) if s.temperature > 0 and not _filters(s)]
    if open_rows:
        probabilities = _tempered(scores, open_rows, settings).softmax(-1)
        tokens[open_rows] = _invert(probabilities, [uniforms[r] for r in open_rows])
    if filtered:
        probabilities = _tempered(scores, filtered, settings).softmax(-1)
        chosen = _filtered(probabilities, [settings[r] for r in filtered], [uniforms[r] for r in filtered])
        tokens[filtered] = torch.tensor(chosen, device=scores.device)
    return tokens


def _filters(sampling: SamplingParams) -> bool:
    return sampling.top_p < 1 or sampling.top_k > 0 or sampling.min_p > 0


def _tempered(scores: torch.Tensor, rows: Rows[int], settings: Rows[SamplingParams]) -> torch.Tensor:
    # Below that, dividing overflows, and the best has all the probability long before.
    temperatures = [[max(settings[r].temperature, _LEAST_TEMPERATURE)] for r in rows]
    return scores[list(rows)] / torch.tensor(temperatures, device=scores.device)


def _filtered(probabilities: torch.Tensor, settings: Rows[SamplingParams], uniforms: Rows[float]) -> list[int]:
    """Draw from [n, vocab] what min_p, then top_k, then top_p of the rest leave, as vLLM applies them.

    Only the most likely are sorted as long as a row's filters are sure to end among them: sorting a whole
    vocabulary costs more than the rest of a small model's step. How many is a row's own matter, because the
    order of equals may depend on it.
    """
    vocab = probabilities.shape[-1]
    tokens = [-1] * len(settings)
    left = list(range(len(settings)))
    for size in (*(s for s in _SORTED if s < vocab), vocab):
        rows = [r for r in left if min(settings[r].top_k, vocab) <= size]
        if not rows:
            continue
        kept, order = _filter(probabilities[rows], [settings[r] for r in rows], size)
        places = _invert(kept, [uniforms[r] for r in rows])
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


def _invert(probabilities: torch.Tensor, uniforms: Rows[float]) -> torch.Tensor:
    """The first place in each row whose cumulative sum passes the row's uniform number; [n] int64."""
    sums = probabilities.double().cumsum(-1)
    points = torch.tensor(uniforms, dtype=torch.float64, device=sums.device)[:, None] * sums[:, -1:]
    places = torch.searchsorted(sums, points, right=True)[:, 0]
    return places.clamp(max=sums.shape[-1] - 1)
