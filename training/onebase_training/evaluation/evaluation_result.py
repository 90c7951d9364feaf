"""The result of an evaluation: loss, score and answers, and how two compare."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from onebase_engine.text.stop_strings import first_stop
from onebase_training.data import NO_LOSS, Encoded
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


def asked(examples: Sequence[Encoded], count: int) -> list[Encoded]:
    """The first `count` that ask something: a text without a prompt has no answer to judge."""
    return [example for example in examples if example.prompt_length][:count]


def sample(tokenizer: Any, example: Encoded, written: Sequence[int]) -> Sample:
    """Put what was written after the example's prompt beside what was wanted; both up to what ends an answer."""
    texts = [example.input_ids[: example.prompt_length], answer(example), written]
    prompt, expected, generated = (tokenizer.decode(text, skip_special_tokens=True) for text in texts)
    return Sample(prompt, _cut(expected, example.stop), _cut(generated, example.stop))


def _cut(text: str, stops: Sequence[str]) -> str:
    found = first_stop(text, stops)
    return text if found is None else text[: found[1]]


def answer(example: Encoded) -> list[int]:
    """The tokens of the completion that `prompt_length` starts, with its end."""
    labels = example.labels[example.prompt_length :]
    return [label for label in labels if label != NO_LOSS]


def room(example: Encoded, max_new_tokens: int) -> int:
    """Tokens that an answer may take: a little more than the wanted one took."""
    return min(max_new_tokens, len(answer(example)) + 8)


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
