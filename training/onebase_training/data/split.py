"""Training and held-out parts, such that nothing held out was as good as seen."""

import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace

from onebase_adapters.errors import DataError
from onebase_training.data.duplicates import groups
from onebase_training.data.examples import Dataset, Example


def split(
    dataset: Dataset, *, eval_fraction: float, seed: int, group: Callable[[Example], str] | None = None
) -> tuple[Dataset, Dataset]:
    """Training part and held-out part, the same for the same seed; each task is split by the same fraction.

    Examples of one `group` stay on one side; without it, those whose prompts are near-duplicates. Raises DataError
    where that leaves nothing to hold out.
    """
    held_out: set[int] = set()
    random_order = random.Random(seed)
    for task in sorted({example.task for example in dataset.examples}):
        places = [at for at, example in enumerate(dataset.examples) if example.task == task]
        members = [dataset.examples[at] for at in places]
        keys = groups([one.identity for one in members]) if group is None else [group(one) for one in members]
        chosen = _choose(keys, max(1, round(len(members) * eval_fraction)), random_order)
        if not chosen:
            raise DataError(
                f"{dataset.source} cannot be split{f' for the task {task!r}' if task else ''}: its prompts are too "
                "few, or near-duplicates of each other. Give held-out data of its own.",
                field="eval_data",
            )
        held_out |= {places[at] for at in chosen}
    parts: tuple[list[Example], list[Example]] = ([], [])
    for place, example in enumerate(dataset.examples):
        parts[place in held_out].append(example)
    return replace(dataset, examples=tuple(parts[0])), replace(dataset, examples=tuple(parts[1]))


def _choose(keys: Sequence[int | str], wanted: int, random_order: random.Random) -> list[int]:
    """Places of whole groups, at random, `wanted` of them or a little less; never all."""
    members: defaultdict[int | str, list[int]] = defaultdict(list)
    for place, key in enumerate(keys):
        members[key].append(place)
    chosen: list[int] = []
    for group in random_order.sample(list(members.values()), len(members)):
        if len(chosen) + len(group) <= wanted < len(keys):
            chosen += group
    if not chosen and len(members) > 1:  # every group is larger than what is wanted
        smallest = min(members.values(), key=len)
        chosen = smallest if len(smallest) <= len(keys) // 2 else []
    return chosen
