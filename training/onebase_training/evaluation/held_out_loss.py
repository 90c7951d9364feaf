"""How good a model is on held-out examples: its loss on all of them, and the task's metric on some."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from onebase_contract.events import Part, Progress, silent
from onebase_training.data import NO_LOSS, Encoded
from onebase_training.data.encoding.packing import pack
from onebase_training.evaluation.evaluation_result import Sample
from onebase_training.model.trained_model import Trained

_PASS_TOKENS = 1024
"""Tokens of a pass that measures a loss, unless the caller says otherwise."""


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
