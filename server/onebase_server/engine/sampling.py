"""Choosing tokens: all rows of a step at once, each by its own request's settings and nothing else.

Invariant: a row's token depends on its logits, its request and how many tokens it already has. Its random
number comes from (seed, position), not from a shared stream, so company and preemption change nothing.
"""

import hashlib
from collections.abc import Sequence as Rows
from dataclasses import dataclass

import torch

from onebase_adapters.model.head import Scores
from onebase_server.engine.request import SamplingParams, TokenLogprobs
from onebase_server.engine.sequence import Sequence


@dataclass(frozen=True)
class Choice:
    """A row's chosen token, with logprobs if they were asked for."""

    token: int
    """-1 where the logits are not finite, so that no token can be chosen."""
    logprobs: TokenLogprobs | None = None


def sample(scores: Scores, rows: Rows[int], sequences: Rows[Sequence]) -> list[Choice]:
    """Choose a next token for each of `sequences`, whose scores are in the row of the same place."""
    choices = [Choice(-1)] * len(sequences)
    greedy = [place for place, sequence in enumerate(sequences) if _is_plain_greedy(sequence)]
    if greedy:
        for place, token in zip(greedy, scores.best([rows[p] for p in greedy]), strict=True):
            choices[place] = Choice(token)
    others = [place for place, sequence in enumerate(sequences) if not _is_plain_greedy(sequence)]
    if others:
        logits = scores.logits([rows[p] for p in others]).float()
        for place, choice in zip(others, _draw(logits, [sequences[p] for p in others]), strict=True):
            choices[place] = choice
    return choices


def _draw(raw: torch.Tensor, sequences: Rows[Sequence]) -> list[Choice]:
    """Choose from raw logits [n, vocab], float32."""
    scores = raw
    if any(_changes_scores(s) for s in sequences):
        scores = raw.clone()
        for row, sequence in enumerate(sequences):
            _apply_penalties(scores[row], sequence)
    chosen = _choose(scores, [s.request.sampling for s in sequences], [_uniform(s) for s in sequences])
    # Not the penalised scores: those are -inf on purpose here and there.
    tokens: list[int] = torch.where(raw.max(-1).values.isfinite(), chosen, -1).tolist()
    wanted = [
        row for row, s in enumerate(sequences) if s.request.sampling.logprobs is not None and tokens[row] >= 0
    ]
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
    """One token for each row: greedy where the temperature is 0, else drawn by inverting the cumulative sum of
    what the filters leave of its distribution."""
    tokens = scores.argmax(-1)
    filtered = [r for r, s in enumerate(settings) if s.temperature > 0 and _filters(s)]
    open_rows = [r for r, s in enumerate(settings) if s.temperature > 0 and not _filters(s)]
    if open_rows:
        probabilities = _tempered(scores, open_rows, settings).softmax(-1)
        tokens[open_rows] = _invert(probabilities, [uniforms[r] for r in open_rows])
    if filtered:
        chosen = [settings[r] for r in filtered]
        probabilities = _tempered(scores, filtered, settings).softmax(-1)
        kept, order = _filter(probabilities, chosen)
        places = _invert(kept, [uniforms[r] for r in filtered])
        tokens[filtered] = order.gather(1, places[:, None])[:, 0]
    return tokens


def _filters(sampling: SamplingParams) -> bool:
    return sampling.top_p < 1 or sampling.top_k > 0 or sampling.min_p > 0


def _tempered(scores: torch.Tensor, rows: Rows[int], settings: Rows[SamplingParams]) -> torch.Tensor:
    temperatures = torch.tensor([[settings[r].temperature] for r in rows], device=scores.device)
    return scores[list(rows)] / temperatures


def _filter(probabilities: torch.Tensor, settings: Rows[SamplingParams]) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities with the filtered ones set to 0, most likely first, and their token ids; [n, k] each.

    Only the k most likely are sorted as long as the filters are sure to end among them: sorting a whole
    vocabulary costs more than the rest of a small model's step.
    """
    device = probabilities.device
    vocab = probabilities.shape[-1]
    top_p = torch.tensor([[s.top_p] for s in settings], device=device)
    top_k = torch.tensor([[s.top_k or vocab] for s in settings], device=device)
    min_p = torch.tensor([[s.min_p] for s in settings], device=device)
    size = min(vocab, 256)
    while True:
        ordered, order = probabilities.topk(size, dim=-1)
        before = ordered.cumsum(-1) - ordered
        ranks = torch.arange(size, device=device)[None]
        keep = (before < top_p) & (ranks < top_k) & (ordered >= min_p * ordered[:, :1])
        keep[:, 0] = True
        if size == vocab or not bool(keep[:, -1].any()):
            return ordered * keep, order
        size = min(vocab, size * 16)


def _invert(probabilities: torch.Tensor, uniforms: Rows[float]) -> torch.Tensor:
    """The first place in each row whose cumulative sum passes the row's uniform number; [n] int64."""
    sums = probabilities.double().cumsum(-1)
    points = torch.tensor(uniforms, dtype=torch.float64, device=sums.device)[:, None] * sums[:, -1:]
    places = torch.searchsorted(sums, points, right=True)[:, 0]
    return places.clamp(max=sums.shape[-1] - 1)
