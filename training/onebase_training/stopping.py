"""When to stop early: a function of the log, which checkpoints keep, so that a resumed run decides the same."""

from collections.abc import Mapping, Sequence
from typing import Literal

Log = Sequence[Mapping[str, float]]
"""transformers' log: rows with `step` and `loss` (of a step) or `eval_loss` (held out)."""

Stopped = Literal["done", "plateau", "over-fitting", "time limit"]
"""Why a run ended."""

_RISE = 1.05
"""Above the best held-out loss by this factor, a rise is more than noise."""


def early_stop(log: Log, patience: int) -> Stopped | None:
    """Whether the log so far is reason enough. `patience` 0: never."""
    if not patience:
        return None
    if _overfits(log):
        return "over-fitting"
    losses = [row["eval_loss"] for row in log if "eval_loss" in row]
    if len(losses) > patience and min(losses[-patience:]) >= min(losses[:-patience]):
        return "plateau"
    return None


def _overfits(log: Log) -> bool:
    """Twice in a row the held-out loss rose while the training loss fell, and it is clearly above its best."""
    held: list[float] = []
    trained: list[float] = []
    since: list[float] = []
    for row in log:
        if "loss" in row:
            since.append(row["loss"])
        elif "eval_loss" in row and since:
            held.append(row["eval_loss"])
            trained.append(sum(since) / len(since))
            since = []
    if len(held) < 3:
        return False
    rose = held[-3] < held[-2] < held[-1] and held[-1] > _RISE * min(held)
    return rose and trained[-3] > trained[-2] > trained[-1]
