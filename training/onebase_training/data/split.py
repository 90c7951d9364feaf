"""Training and held-out parts, such that nothing held out was as good as seen."""

import random
import re
import unicodedata
from dataclasses import replace

from onebase_adapters.errors import DataError
from onebase_training.data.examples import Dataset, Example


def split(dataset: Dataset, *, eval_fraction: float, seed: int) -> tuple[Dataset, Dataset]:
    """Training part and held-out part, the same for the same seed. Raises DataError where one would be empty."""
    groups: dict[str, list[Example]] = {}
    for example in dataset.examples:
        groups.setdefault(normalised(prompt_of(example)), []).append(example)
    wanted = max(1, round(len(dataset.examples) * eval_fraction))
    held_out: set[int] = set()
    for key in random.Random(seed).sample(sorted(groups), len(groups)):
        if len(held_out) + len(groups[key]) <= wanted:
            held_out |= {example.line for example in groups[key]}
    if not held_out or len(held_out) == len(dataset.examples):
        raise DataError(f"{dataset.source} cannot be split: its prompts are too few, or too alike.")
    return (
        replace(dataset, examples=tuple(one for one in dataset.examples if one.line not in held_out)),
        replace(dataset, examples=tuple(one for one in dataset.examples if one.line in held_out)),
    )


def prompt_of(example: Example) -> str:
    """What the model is given: the text up to the (first) answer."""
    if example.turns:
        first = next((at for at, turn in enumerate(example.turns) if turn.role == "assistant"), None)
        return "\n".join(turn.content for turn in example.turns[:first])
    return " ".join(example.words) if example.words else example.prompt or ""


def normalised(text: str) -> str:
    """`text` without what tells near-duplicates apart: case, punctuation, width, spacing."""
    return " ".join(re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold()))
