"""Early stops, as a function of the log."""

from collections.abc import Sequence

import pytest

from onebase_training.stopping import early_stop


def log(held_out: Sequence[float], training: Sequence[float]) -> list[dict[str, float]]:
    rows: list[dict[str, float]] = []
    for held, trained in zip(held_out, training, strict=True):
        rows += [{"loss": trained + 0.1}, {"loss": trained - 0.1}, {"eval_loss": held}]
    return rows


@pytest.mark.parametrize(
    ("held_out", "training", "reason"),
    [
        ((3, 2, 1), (3, 2, 1), None),
        ((3, 1, 1.01, 1.02), (3, 2, 2, 2), None),
        ((3, 1, 1.01, 1.02, 1), (3, 2, 2, 2, 2), "plateau"),
        ((3, 1, 1.2, 1.4), (3, 2, 1.5, 1), "over-fitting"),
        ((3, 1, 1.2, 1.4), (3, 1, 1.5, 2), None),  # both rise: not over-fitting
        ((3, 1, 1.01, 1.02), (3, 2, 1.5, 1), None),  # hardly above the best
        ((3, 2, 2.5, 1, 1.3), (3, 2, 1.5, 1.2, 1), None),
    ],
)
def test_reasons(held_out: Sequence[float], training: Sequence[float], reason: str | None) -> None:
    assert early_stop(log(held_out, training), patience=3) == reason
    assert early_stop(log(held_out, training), patience=0) is None
