"""Which checkpoint is the best so far, and when to stop looking for a better one: functions of the log, which
checkpoints keep, so that a resumed run decides the same."""

import math
from collections.abc import Mapping, Sequence
from typing import Literal

Log = Sequence[Mapping[str, float]]
"""transformers' log: rows with `step` and `loss` (of a step), or `eval_loss` and, of a classification,
`eval_accuracy` (of the held-out part)."""

Stopped = Literal["done", "plateau", "over-fitting", "time limit"]
"""Why a run ended."""

_RISE = 1.05
"""Above the best held-out loss by this factor, a rise is more than noise."""


def best_evaluation(log: Log, examples: int) -> int:
    """Which of the log's evaluations, counted from 0, is the best; `examples` are held out.

    It has the lowest loss. Of a classification, whose loss rises with the model's certainty long before its answers
    get worse, it is the last one within a standard error of the highest accuracy: so near the schedule's end as the
    examples can tell. With each evaluation the best is as before or the newest, so older checkpoints may go.
    """
    held = [row for row in log if "eval_loss" in row]
    if not all("eval_accuracy" in row for row in held):
        losses = [row["eval_loss"] for row in held]
        return losses.index(min(losses))
    accuracies = [row["eval_accuracy"] for row in held]
    highest = max(accuracies)
    least = highest - math.sqrt(highest * (1 - highest) / examples)
    return max(place for place, accuracy in enumerate(accuracies) if accuracy >= least)


def early_stop(log: Log, examples: int, patience: int) -> Stopped | None:
    """Whether the log so far is reason enough: `patience` evaluations after the best one. 0: never."""
    held = [row["eval_loss"] for row in log if "eval_loss" in row]
    if not patience or len(held) <= patience:
        return None
    best = best_evaluation(log, examples)
    if len(held) - 1 - best < patience:
        return None
    trained = _training_losses(log)
    over = held[-1] > _RISE * held[best] and trained[-1] < trained[best]
    return "over-fitting" if over else "plateau"


def _training_losses(log: Log) -> list[float]:
    """The mean before each evaluation, since the one before."""
    means: list[float] = []
    since: list[float] = []
    for row in log:
        if "loss" in row:
            since.append(row["loss"])
        elif "eval_loss" in row:
            means.append(sum(since) / max(1, len(since)))
            since = []
    return means
