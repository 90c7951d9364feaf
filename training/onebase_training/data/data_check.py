"""Findings about a data set before anything trains on it, as one plain value."""

import unicodedata
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from onebase_training.data.duplicates import groups
from onebase_training.data.encoding.encode import NO_LOSS, Encoded
from onebase_training.data.examples import Dataset, Example
from onebase_training.data.task_kind import default_metric, is_classification

Lines = tuple[int, ...]


@dataclass(frozen=True)
class TooLong:
    """An example that does not fit."""

    line: int
    tokens: int
    prompt: int
    """Tokens of its prompt; if these alone do not fit, it cannot be cut either."""


@dataclass(frozen=True)
class Check:
    """The findings. Lines are those of the file, or of the files together."""

    data: Dataset
    held_out: Dataset | None
    max_length: int
    tasks: Mapping[str, int]
    """Examples of each task."""
    metric: str
    """The metric that the held-out part would be measured by; that of the first task."""
    lengths: tuple[int, ...]
    """Tokens of each sequence to train on, in order."""
    learned: int
    """Tokens with a loss, of all."""
    too_long: tuple[TooLong, ...]
    labels: Mapping[str, int]
    """How often each label, tag, or answer of a classification occurs, the most frequent first; else empty."""
    duplicates: tuple[Lines, ...]
    """Examples whose prompts are near-duplicates of each other."""
    conflicts: tuple[Lines, ...]
    """Examples of the very same prompt with different answers."""
    leaks: tuple[tuple[int, int], ...]
    """(line held out, line in training) of prompts that are near-duplicates."""
    spellings: tuple[tuple[str, ...], ...]
    """Labels that differ only in spaces, case or Unicode form."""
    loose: Lines
    """Chats that begin with the assistant's turn, or end with another's: these turns are read and not learned."""
    samples: tuple[Encoded, ...]


def check(
    data: Dataset,
    sequences: Sequence[Encoded],
    *,
    max_length: int,
    held_out: Dataset | None = None,
    samples: int = 3,
) -> Check:
    """Look at everything that the data could have wrong. `sequences`: its examples, encoded whole."""
    group = groups([one.identity for one in [*data.examples, *(held_out.examples if held_out else ())]])
    tasks = Counter(example.task for example in data.examples)
    first_task = [example for example in data.examples if example.task == data.examples[0].task]
    return Check(
        data=data,
        held_out=held_out,
        max_length=max_length,
        tasks=dict(tasks),
        metric=default_metric(first_task),
        lengths=tuple(len(one.input_ids) for one in sequences),
        learned=sum(label != NO_LOSS for one in sequences for label in one.labels),
        too_long=tuple(
            TooLong(one.example.line, len(one.input_ids), one.prompt_length)
            for one in sequences
            if len(one.input_ids) > max_length
        ),
        labels=_labels(data.examples),
        duplicates=_duplicates(data.examples, group),
        conflicts=_conflicts(data.examples),
        leaks=() if held_out is None else _leaks(data.examples, held_out.examples, group),
        spellings=_spellings(data.labels),
        loose=tuple(example.line for example in data.examples if _has_loose_turn(example)),
        samples=_spread(sequences, samples),
    )


def _labels(examples: Sequence[Example]) -> dict[str, int]:
    counts = Counter(tag for example in examples for tag in example.tags)
    if is_classification(examples):
        counts.update(example.answer.strip() for example in examples if not example.tags)
    return dict(counts.most_common())


def _spellings(labels: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    alike: defaultdict[str, list[str]] = defaultdict(list)
    for label in labels:
        alike[" ".join(unicodedata.normalize("NFKC", label).casefold().split())].append(label)
    return tuple(tuple(group) for group in alike.values() if len(group) > 1)


def _duplicates(examples: Sequence[Example], group: Sequence[int]) -> tuple[Lines, ...]:
    lines: defaultdict[int, list[int]] = defaultdict(list)
    for example, number in zip(examples, group, strict=False):
        lines[number].append(example.line)
    return tuple(tuple(found) for found in lines.values() if len(found) > 1)


def _conflicts(examples: Sequence[Example]) -> tuple[Lines, ...]:
    same: defaultdict[tuple[str, str], list[Example]] = defaultdict(list)
    for example in examples:
        same[example.task, example.asked].append(example)
    return tuple(
        tuple(one.line for one in group)
        for (_, asked), group in same.items()
        if asked.strip() and len({one.answer for one in group}) > 1
    )


def _leaks(
    training: Sequence[Example], held_out: Sequence[Example], group: Sequence[int]
) -> tuple[tuple[int, int], ...]:
    line_of: dict[int, int] = {}
    for example, number in zip(training, group, strict=False):
        line_of.setdefault(number, example.line)
    of_held_out = zip(held_out, group[len(training) :], strict=True)
    return tuple((one.line, line_of[number]) for one, number in of_held_out if number in line_of)


def _has_loose_turn(example: Example) -> bool:
    turns = example.turns
    return bool(turns) and (turns[0].role == "assistant" or turns[-1].role != "assistant")


def _spread(sequences: Sequence[Encoded], count: int) -> tuple[Encoded, ...]:
    """Some sequences from the whole range of lengths, short ones first."""
    by_length = sorted(sequences, key=lambda one: len(one.input_ids))
    count = min(count, len(by_length))
    return tuple(by_length[(2 * at + 1) * len(by_length) // (2 * count)] for at in range(count))


def describe(found: Check) -> list[str]:
    """Say in a few lines what should be known of the data before it trains."""
    lengths = sorted(found.lengths)
    tokens = sum(lengths)
    held_out = len(found.held_out) if found.held_out else 0
    lines = [
        f"{len(found.data):,} examples to train on ({found.data.format}), {held_out:,} held out",
        f"{tokens:,} tokens, {found.learned / tokens:.0%} of them learned; {lengths[0]} to {lengths[-1]} tokens an "
        f"example, median {lengths[len(lengths) // 2]}",
    ]
    if len(found.tasks) > 1:
        lines.append("tasks: " + ", ".join(f"{name} {count:,}" for name, count in found.tasks.items()))
    doubts = {
        "longer than the maximum length": len(found.too_long),
        "of nearly the same prompt as another": sum(map(len, found.duplicates)),
        "of the same prompt as another, with another answer": sum(map(len, found.conflicts)),
        "held out, but nearly as in training": len(found.leaks),
        "labels that differ only in spaces, case or Unicode form": sum(map(len, found.spellings)),
        "records left out": len(found.data.skipped),
    }
    if found.data.unused:
        lines.append(f"columns that are not used: {', '.join(sorted(found.data.unused))}")
    told = [f"{count:,} {what}" for what, count in doubts.items() if count]
    return [*lines, f"careful: {'; '.join(told)} (onebase data check shows them)"] if told else lines
