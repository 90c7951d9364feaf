"""Batches by token budget: examples packed whole into one row, planned for all epochs before the first step.

The plan is a pure function of lengths, budget and seed. So a run knows its number of steps before it starts, and a
resumed run finds its place by counting.
"""

import math
from collections.abc import Sequence

import torch

from onebase_training.data import NO_LOSS, Encoded


def plan_batches(lengths: Sequence[int], *, budget: int, epochs: float, seed: int) -> list[list[int]]:
    """Indices of the examples of each batch, over all `epochs` (a last, broken one is cut at its share).

    A batch holds at most `budget` tokens, or one example that is longer.
    """
    plan: list[list[int]] = []
    for epoch in range(math.ceil(epochs)):
        generator = torch.Generator().manual_seed((seed << 16) + epoch)
        order = torch.randperm(len(lengths), generator=generator).tolist()
        order = order[: max(1, round(len(order) * min(1.0, epochs - epoch)))]
        plan += pack(order, lengths, budget)
    return plan


def pack(order: Sequence[int], lengths: Sequence[int], budget: int) -> list[list[int]]:
    """`order` cut into batches, in order."""
    batches: list[list[int]] = []
    room = 0
    for index in order:
        if lengths[index] > room:
            batches.append([])
            room = budget
        batches[-1].append(index)
        room -= lengths[index]
    return batches


def collate(examples: Sequence[Encoded]) -> dict[str, torch.Tensor]:
    """One packed row of N tokens with M labels, all int64.

    input_ids [N]; bounds [S + 1], where examples start and the last ends; rows [M], the places whose next token is
    learned; labels [M], those tokens.
    """
    ids: list[int] = []
    bounds = [0]
    rows: list[int] = []
    labels: list[int] = []
    for example in examples:
        start = len(ids)
        ids += example.input_ids
        bounds.append(len(ids))
        for place, label in enumerate(example.labels[1:]):
            if label != NO_LOSS:
                rows.append(start + place)
                labels.append(label)
    made = {"input_ids": ids, "bounds": bounds, "rows": rows, "labels": labels}
    return {name: torch.tensor(value, dtype=torch.int64) for name, value in made.items()}
