"""How good predictions are, and how sure that is: each metric is a function of sums over examples.

An example contributes a row of numbers (say: correct, 1), and the metric is a function of the rows' sum (correct /
all). So the bootstrap resamples rows by one matrix product, for F1 and perplexity as well as for means. Texts are
compared after outer space is stripped and inner space is made single.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from onebase_adapters.errors import DataError
from onebase_training.data.task_kind import json_fields
from onebase_training.data.words import compared_words

Floats = NDArray[np.float64]
Combine = Callable[[Floats], Floats]
"""Sums of rows [..., columns] to scores [...]."""

RESAMPLES = 2000


@dataclass(frozen=True)
class Score:
    """A metric's value with its bootstrap interval, or a difference of two values."""

    metric: str
    value: float
    low: float
    high: float
    examples: int


def score(
    metric: str, predictions: Sequence[str], references: Sequence[str], *, confidence: float = 0.95, seed: int = 0
) -> Score:
    """The value of a metric of `METRICS` over all examples, with its percentile bootstrap interval.

    Efron & Tibshirani 1993, "An Introduction to the Bootstrap", chapter 13.
    """
    rows, combine = METRICS[metric](predictions, references)
    values = combine(_resampled(rows, seed))
    return _score(metric, float(combine(rows.sum(0))), values, confidence, len(rows))


def difference(
    metric: str,
    predictions: Sequence[str],
    others: Sequence[str],
    references: Sequence[str],
    *,
    confidence: float = 0.95,
    seed: int = 0,
) -> Score:
    """How much better `predictions` are than `others` on the same examples. Paired: each resample draws the same
    examples for both. A `low` above 0 confirms that they are better.
    """
    (rows, combine), (other_rows, _) = METRICS[metric](predictions, references), METRICS[metric](others, references)
    columns = rows.shape[1]
    sums = _resampled(np.concatenate([rows, other_rows], 1), seed)
    values = combine(sums[:, :columns]) - combine(sums[:, columns:])
    value = float(combine(rows.sum(0)) - combine(other_rows.sum(0)))
    return _score(metric, value, values, confidence, len(rows))


def perplexity(losses: Sequence[float], tokens: Sequence[int], *, confidence: float = 0.95, seed: int = 0) -> Score:
    """exp of the mean loss (nats) per token; `losses` are sums over an example's learned `tokens`."""
    rows = np.array([losses, tokens], dtype=np.float64).T
    values = _perplexity(_resampled(rows, seed))
    return _score("perplexity", float(_perplexity(rows.sum(0))), values, confidence, len(rows))


def exact_match(prediction: str, reference: str) -> float:
    """1.0 if the texts are the same."""
    return float(prediction.split() == reference.split())


def rouge_l(prediction: str, reference: str) -> float:
    """F1 of the longest common subsequence of words, of characters in Chinese and Japanese (Lin 2004, "ROUGE")."""
    ours, theirs = compared_words(prediction, unspaced=1), compared_words(reference, unspaced=1)
    lengths = [0] * (len(theirs) + 1)
    for word in ours:
        diagonal = 0
        for at, other in enumerate(theirs, 1):
            best = diagonal + 1 if word == other else max(lengths[at], lengths[at - 1])
            diagonal, lengths[at] = lengths[at], best
    return 2 * lengths[-1] / (len(ours) + len(theirs))


def spans(tags: Sequence[str]) -> set[tuple[int, int, str]]:
    """The entities of a tag sequence as (first, last + 1, type).

    B-, I-, E-, S- prefixes are honoured, leniently as conlleval does (an I- that continues nothing begins a span);
    without prefixes, each run of one tag is a span. "O" is no entity.
    """
    found: set[tuple[int, int, str]] = set()
    start, current = 0, ""
    for at, tag in enumerate([*tags, "O"]):
        prefix, _, kind = tag.partition("-") if tag[:2] in ("B-", "I-", "E-", "S-") else ("I", "", tag)
        kind = "" if tag == "O" else kind
        if kind != current or prefix in ("B", "S"):
            if current:
                found.add((start, at, current))
            start, current = at, kind
        if prefix in ("E", "S") and current:
            found.add((start, at + 1, current))
            current = ""
    return found


def _mean_of(one: Callable[[str, str], float]) -> "Metric":
    def metric(predictions: Sequence[str], references: Sequence[str]) -> tuple[Floats, Combine]:
        values = [one(mine, wanted) for mine, wanted in zip(predictions, references, strict=True)]
        return np.array([values, np.ones(len(values))]).T, lambda sums: sums[..., 0] / sums[..., 1]

    return metric


def _entity_f1(predictions: Sequence[str], references: Sequence[str]) -> tuple[Floats, Combine]:
    """Micro F1 of exact spans; predictions and references are tags with spaces between."""
    rows = []
    for mine, wanted in zip(predictions, references, strict=True):
        ours, theirs = spans(mine.split()), spans(wanted.split())
        rows.append((len(ours & theirs), len(ours), len(theirs)))
    return np.array(rows, dtype=np.float64), _f1


def _field_f1(predictions: Sequence[str], references: Sequence[str]) -> tuple[Floats, Combine]:
    """Micro F1 of the fields of JSON objects, by key and value; what is no object has none."""
    rows = []
    for mine, wanted in zip(predictions, references, strict=True):
        ours, theirs = json_fields(mine), json_fields(wanted)
        rows.append((len(ours & theirs), len(ours), len(theirs)))
    return np.array(rows, dtype=np.float64), _f1


def _macro_f1(predictions: Sequence[str], references: Sequence[str]) -> tuple[Floats, Combine]:
    """Mean F1 of the classes that occur in the references; another prediction is wrong and no class of its own."""
    ours = [" ".join(text.split()) for text in predictions]
    theirs = [" ".join(text.split()) for text in references]
    classes = sorted(set(theirs))
    hits = [
        [(mine == wanted == name, mine == name, wanted == name) for name in classes]
        for mine, wanted in zip(ours, theirs, strict=True)
    ]
    rows = np.array(hits, dtype=np.float64).reshape(len(theirs), 3 * len(classes))

    def combine(sums: Floats) -> Floats:
        by_class = sums.reshape(*sums.shape[:-1], -1, 3)
        occurs = by_class[..., 2] > 0  # a resample may lack a class
        mean: Floats = np.where(occurs, _f1(by_class), 0).sum(-1) / occurs.sum(-1)
        return mean

    return rows, combine


def _f1(sums: Floats) -> Floats:
    """2 hits / (predicted + wanted), 1 where nothing was wanted and nothing predicted."""
    hits, predicted, wanted = sums[..., 0], sums[..., 1], sums[..., 2]
    total = predicted + wanted
    return np.where(total > 0, 2 * hits / np.maximum(total, 1), 1.0)


def _perplexity(sums: Floats) -> Floats:
    return np.exp(sums[..., 0] / sums[..., 1])


def _resampled(rows: Floats, seed: int) -> Floats:
    """Sums of rows [n, columns] over resamples of n rows with replacement: [RESAMPLES, columns]."""
    count = len(rows)
    if not count:
        raise DataError("There are no examples to score.", field="data")
    random = np.random.default_rng(seed)
    at_once = max(1, 2_000_000 // count)
    sums = []
    for start in range(0, RESAMPLES, at_once):
        size = (min(at_once, RESAMPLES - start), count)
        times = random.multinomial(count, np.full(count, 1 / count), size=size[0])
        sums.append(times @ rows)
    return np.concatenate(sums)


def _score(metric: str, value: float, resampled: Floats, confidence: float, examples: int) -> Score:
    tail = (1 - confidence) / 2
    low, high = np.quantile(resampled, [tail, 1 - tail])
    return Score(metric, value, float(low), float(high), examples)


Metric = Callable[[Sequence[str], Sequence[str]], tuple[Floats, Combine]]

METRICS: dict[str, Metric] = {
    "exact_match": _mean_of(exact_match),
    "accuracy": _mean_of(exact_match),
    "macro_f1": _macro_f1,
    "rouge_l": _mean_of(rouge_l),
    "entity_f1": _entity_f1,
    "field_f1": _field_f1,
}
"""By name; all are better when higher."""
