"""What came of an evaluation: loss, score and answers, and how two compare."""

from collections.abc import Sequence
from dataclasses import dataclass

from onebase_training.data import Encoded
from onebase_training.data.task_kind import default_metric
from onebase_training.evaluation.metrics import Score, difference, score


@dataclass(frozen=True)
class Sample:
    """One generated answer beside what was wanted."""

    prompt: str
    expected: str
    generated: str


@dataclass(frozen=True)
class Evaluation:
    """A model's marks."""

    loss: float
    """Mean over the held-out part's learned tokens, in nats."""
    score: Score | None
    """The task's metric over `samples`; None without any."""
    samples: Sequence[Sample]

    @property
    def marks(self) -> dict[str, float]:
        """Loss and metric by name."""
        return {"loss": self.loss} | ({self.score.metric: self.score.value} if self.score else {})


def mark(samples: Sequence[Sample], examples: Sequence[Encoded]) -> Score | None:
    """The samples' score by the metric that fits `examples`."""
    if not samples:
        return None
    metric = default_metric([one.example for one in examples])
    return score(metric, [one.generated for one in samples], [one.expected for one in samples])


def gain(before: Evaluation, after: Evaluation) -> Score | None:
    """By how much the metric rose, with its interval over the samples that both have: a classifier has all."""
    if before.score is None or after.score is None:
        return None
    both = list(zip(after.samples, before.samples, strict=False))
    ours, base = ([one[side].generated for one in both] for side in (0, 1))
    return difference(before.score.metric, ours, base, [mine.expected for mine, _ in both])
