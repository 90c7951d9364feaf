"""The best evaluation and early stops, as functions of the log."""

from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onebase_training.fitting.early_stopping import Log, best_evaluation, early_stop


def log(
    held_out: Sequence[float], training: Sequence[float] = (), accuracies: Sequence[float] = ()
) -> list[dict[str, float]]:
    rows: list[dict[str, float]] = []
    for place, held in enumerate(held_out):
        if training:
            rows += [{"loss": training[place] + 0.1}, {"loss": training[place] - 0.1}]
        rows.append({"eval_loss": held} | ({"eval_accuracy": accuracies[place]} if accuracies else {}))
    return rows


@pytest.mark.parametrize(
    ("held_out", "training", "reason"),
    [
        ((3, 2, 1), (3, 2, 1), None),
        ((3, 1, 1.01, 1.02), (3, 2, 2, 2), None),
        ((3, 1, 1.01, 1.02, 1), (3, 2, 2, 2, 2), "plateau"),
        ((3, 1, 1.2, 1.3, 1.4), (3, 2, 1.5, 1.2, 1), "over-fitting"),
        ((3, 1, 1.2, 1.3, 1.4), (3, 1, 1.5, 2, 2), "plateau"),  # both rise
        ((3, 1, 1.01, 1.02, 1.03), (3, 2, 1.5, 1, 1), "plateau"),  # hardly above the best
        ((3, 1, 1.2, 1.4, 0.9), (3, 2, 1.5, 1.2, 1), None),  # after a spike it goes on
    ],
)
def test_reasons_by_loss(held_out: Sequence[float], training: Sequence[float], reason: str | None) -> None:
    assert early_stop(log(held_out, training), 100, patience=3) == reason
    assert early_stop(log(held_out, training), 100, patience=0) is None


@pytest.mark.parametrize(
    ("accuracies", "examples", "best"),
    [
        ((0.6, 0.8, 0.7), 400, 1),
        ((0.6, 0.84, 0.83), 400, 2),  # within 1.8 points
        ((0.6, 0.84, 0.83), 4000, 1),  # and no longer within 0.6
        ((0.8, 0.8, 0.8), 400, 2),
        ((0.5, 1.0, 0.9), 10, 1),
        ((0.0, 0.0), 10, 1),
    ],
)
def test_a_classification_is_judged_by_accuracy(accuracies: Sequence[float], examples: int, best: int) -> None:
    rising = [1.0 + place for place in range(len(accuracies))]
    assert best_evaluation(log(rising, accuracies=accuracies), examples) == best


def test_a_classification_stops_when_its_accuracy_is_lost() -> None:
    held_out, training = (0.2, 0.3, 0.4, 0.5, 0.6), (0.5, 0.4, 0.3, 0.2, 0.1)
    assert early_stop(log(held_out, training, (0.8, 0.81, 0.8, 0.81, 0.8)), 400, patience=3) is None
    assert early_stop(log(held_out, training, (0.8, 0.81, 0.7, 0.7, 0.7)), 400, patience=3) == "over-fitting"


@given(st.lists(st.integers(0, 50), min_size=2, max_size=12), st.booleans())
def test_what_is_not_the_best_any_more_never_is_again(marks: list[int], by_accuracy: bool) -> None:
    held_out = [1.0 - mark / 50 for mark in marks]
    whole: Log = log(held_out, accuracies=[mark / 50 for mark in marks] if by_accuracy else ())
    bests = [best_evaluation(whole[:count], 50) for count in range(1, len(whole) + 1)]
    assert all(best in (before, place) for place, (before, best) in enumerate(pairwise(bests), 1))
