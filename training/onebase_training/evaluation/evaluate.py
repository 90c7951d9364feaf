"""How good a model is on held-out examples: its loss on all of them, and the task's metric on some."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from onebase_adapters.stops import first_stop
from onebase_training.data import NO_LOSS, Encoded
from onebase_training.data.batches import pack
from onebase_training.data.task import default_metric
from onebase_training.evaluation.metrics import Score, difference, score
from onebase_training.events import Part, Progress, silent
from onebase_training.model.trained import Trained

_PASS_TOKENS = 1024
"""Of a pass that measures a loss, where nothing else is said."""


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


@dataclass(frozen=True)
class Measured:
    """How well a model continues held-out examples, each token after the right ones before it."""

    loss: float
    """Mean per learned token, in nats."""
    wrong: int
    """Examples of which some learned token is not the likeliest: those that greedy decoding answers otherwise."""


@torch.no_grad()
def measure(
    model: Trained, examples: Sequence[Encoded], pass_tokens: int | None = None, progress: Progress = silent
) -> Measured:
    """Leaves the model in the mode it was in. Takes less memory than training with passes of as many tokens."""
    training = model.training
    model.eval()
    total, count, wrong, seen = 0.0, 0, 0, 0
    for batch, learned in _batches(model, examples, pass_tokens):
        progress(Part(seen, len(examples), "held-out examples"))
        seen += len(learned)
        labels = batch.pop("labels")
        logits = model(**batch)
        total += float(cross_entropy(logits, labels, reduction="sum"))
        count += labels.numel()
        wrong += sum(not bool(hits.all()) for hits in (logits.argmax(-1) == labels).split(learned))
    model.train(training)
    return Measured(total / count, wrong)


@torch.no_grad()
def classify(
    model: Trained, examples: Sequence[Encoded], tokenizer: Any, pass_tokens: int | None = None
) -> list[Sample]:
    """The head's most likely class for each label, beside the label; an example's tags in one string."""
    head = model.attached.head
    if head is None:
        raise TypeError("The model has no head.")
    training = model.training
    model.eval()
    found: list[int] = []
    for batch, _ in _batches(model, examples, pass_tokens):
        labels = batch.pop("labels")
        found += model.logits(**batch).argmax(-1).tolist()[: labels.numel()]
    model.train(training)
    samples, rest = [], iter(found)
    for example in examples:
        wanted = [label for label in example.labels if label != NO_LOSS]
        names = [[head.classes[index] for index in (next(rest), label)] for label in wanted]
        prompt: str = tokenizer.decode(example.input_ids, skip_special_tokens=True)
        samples.append(Sample(prompt, " ".join(want for _, want in names), " ".join(ours for ours, _ in names)))
    return samples


def _batches(
    model: Trained, examples: Sequence[Encoded], pass_tokens: int | None
) -> Iterator[tuple[dict[str, torch.Tensor], list[int]]]:
    """Batches, and how many labels each of their examples has."""
    lengths = [model.length(one) for one in examples]
    for indices in pack(range(len(examples)), lengths, pass_tokens or _PASS_TOKENS, padded=model.paired):
        chosen = [examples[index] for index in indices]
        batch = model.collate(chosen)
        learned = [model.collate.learned(example) for example in chosen]
        yield {name: value.to(model.device) for name, value in batch.items()}, learned


def sample(tokenizer: Any, example: Encoded, written: Sequence[int]) -> Sample:
    """What was written after the example's prompt, beside what was wanted; both up to what ends an answer."""
    texts = [example.input_ids[: example.prompt_length], answer(example), written]
    prompt, expected, generated = (tokenizer.decode(text, skip_special_tokens=True) for text in texts)
    return Sample(prompt, _cut(expected, example.stop), _cut(generated, example.stop))


def _cut(text: str, stops: Sequence[str]) -> str:
    found = first_stop(text, stops)
    return text if found is None else text[: found[1]]


def ends_of(model: PreTrainedModel, tokenizer: Any) -> frozenset[int]:
    """What ends an answer: the tokenizer's end of text, and what the model's own generation settings name."""
    named = model.generation_config.eos_token_id if model.generation_config else None
    ends = {*(named if isinstance(named, list) else [named]), tokenizer.eos_token_id}
    return frozenset(end for end in ends if end is not None)


def answer(example: Encoded) -> list[int]:
    """The tokens of the completion that `prompt_length` starts, with its end."""
    labels = example.labels[example.prompt_length :]
    return [label for label in labels if label != NO_LOSS]
