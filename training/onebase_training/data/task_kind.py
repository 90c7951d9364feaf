"""The kind of task that examples are, by their answers."""

import json
from collections import Counter
from collections.abc import Sequence

from onebase_adapters.errors import DataError
from onebase_training.data import Dataset
from onebase_training.data.examples import Example
from onebase_training.data.words import compared_words


def default_metric(examples: Sequence[Example]) -> str:
    """The metric of `evaluation.metrics` that fits these examples, by their answers.

    Tags: entity F1. JSON objects: F1 of their fields. Few different answers (a classification): accuracy, or macro
    F1 where one of them is more than three quarters. Short ones: exact match. Longer ones: ROUGE-L.
    """
    if any(example.words for example in examples):
        return "entity_f1"
    if all(json_fields(example.answer) for example in examples):
        return "field_f1"
    if is_classification(examples):
        answers = Counter(example.answer.strip() for example in examples)
        return "macro_f1" if 4 * max(answers.values()) > 3 * len(examples) else "accuracy"
    lengths = sorted(len(compared_words(example.answer, unspaced=1)) for example in examples)
    return "exact_match" if lengths[len(lengths) // 2] <= 30 else "rouge_l"


def is_classification(examples: Sequence[Example]) -> bool:
    """Whether the answers are labels: called so, or few different ones."""
    answers = {example.answer.strip() for example in examples}
    return all(example.label is not None for example in examples) or 10 * len(answers) <= len(examples)


def json_fields(text: str) -> set[tuple[str, str]]:
    """A JSON object's fields with their values as JSON; none of any other text."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return set()
    if not isinstance(value, dict):
        return set()
    return {(key, json.dumps(inner, sort_keys=True)) for key, inner in value.items()}


def classes_of(dataset: Dataset) -> tuple[str, ...]:
    """The labels or tags of training data. Raises DataError where there is nothing to tell apart."""
    classes = dataset.labels
    if not classes:
        raise DataError(
            f"{dataset.source} ({dataset.format}) has neither labels nor tags: a classifier cannot learn from it.",
            field="data",
        )
    if len({bool(example.words) for example in dataset.examples}) == 2:
        raise DataError(
            f"{dataset.source}: a classifier labels whole texts or words, not some of both. Train one for each.",
            field="data",
        )
    if len(classes) == 1:
        raise DataError(f"Every example of {dataset.source} has the same label, {classes[0]!r}.", field="data")
    return classes
