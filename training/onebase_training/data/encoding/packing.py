"""Batches by token budget: examples packed whole into one row, planned for all epochs before the first step.

The plan is a pure function of lengths, budget and seed. So a run knows its number of steps before it starts, and a
resumed run finds its place by counting.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from onebase_adapters.errors import ConfigError
from onebase_contract.settings import TrainConfig

_EXAMPLES, _FEWEST_TOKENS, _MOST_TOKENS = 8, 256, 1024


def tokens_of_pass(lengths: Sequence[int], config: TrainConfig) -> int:
    """`config.batch_tokens`, or what suits examples of these lengths: 8 of the mean length, within 256 and 1024,
    so that short ones make many steps, too. Where `batch_size` counts the step, 1024: it only bounds memory."""
    if config.batch_tokens is not None:
        return config.batch_tokens
    if config.batch_size is not None:
        return _MOST_TOKENS
    return min(_MOST_TOKENS, max(_FEWEST_TOKENS, _EXAMPLES * sum(lengths) // len(lengths)))


@dataclass(frozen=True)
class Batches:
    """A run's batches, and which of them make a step."""

    plan: Sequence[Sequence[int]]
    """Indices of the examples of each batch, in the order of training."""
    passes: int
    """Batches of a step that each process takes."""
    world: int
    """Processes."""
    steps: int

    def places_of_step(self, step: int) -> range:
        """Where the step's batches are in the plan; the last step may have fewer. Past it: none."""
        whole = self.passes * self.world
        return range(min(step * whole, len(self.plan)), min((step + 1) * whole, len(self.plan)))

    def of_step(self, step: int, rank: int) -> list[Sequence[int]]:
        """The batches of one process, as many as every other's: a short last round begins the plan again."""
        batches = [self.plan[place] for place in self.places_of_step(step)]
        batches += self.plan[: -len(batches) % self.world]
        return batches[rank :: self.world]


def plan_run(lengths: Sequence[int], config: TrainConfig, *, world: int, padded: bool = False) -> Batches:
    """The batches of a run over examples of these lengths. Raises ConfigError."""
    budget, passes = tokens_of_pass(lengths, config), config.accumulate
    if config.batch_size is not None:
        passes = passes_of(lengths, config.batch_size, budget=budget, world=world)
        size = config.batch_size // (passes * world)
        plan = plan_examples(lengths, size, epochs=config.epochs, seed=config.seed)
    else:
        plan = plan_batches(lengths, budget=budget, epochs=config.epochs, seed=config.seed, padded=padded)
    steps = -(-len(plan) // (passes * world))
    steps = min(steps, config.max_steps or steps)
    return Batches(plan[: steps * passes * world], passes, world, steps)


def plan_batches(
    lengths: Sequence[int], *, budget: int, epochs: float, seed: int, padded: bool = False
) -> list[list[int]]:
    """Indices of the examples of each batch, over all `epochs` (a last, broken one is cut at its share).

    A batch holds at most `budget` tokens, or one example that is longer. `padded`: with all as long as its longest.
    """
    plan: list[list[int]] = []
    for order in _orders(len(lengths), epochs, seed):
        plan += pack(order, lengths, budget, padded=padded)
    return plan


def plan_examples(lengths: Sequence[int], size: int, *, epochs: float, seed: int) -> list[list[int]]:
    """The same with `size` examples in each batch, whatever their lengths; only the very last may have fewer."""
    order = [index for part in _orders(len(lengths), epochs, seed) for index in part]
    return [order[start : start + size] for start in range(0, len(order), size)]


def passes_of(lengths: Sequence[int], batch_size: int, *, budget: int, world: int = 1) -> int:
    """In how many equal passes each of `world` processes takes its share of `batch_size` examples: the fewest whose
    tokens are within `budget` on average, at most one for each example. Raises ConfigError."""
    if batch_size % world:
        raise ConfigError(
            f"batch_size {batch_size} is no multiple of the {world} processes that share it.", field="batch_size"
        )
    share, mean = batch_size // world, sum(lengths) / len(lengths)
    fitting = (passes for passes in range(1, share) if share % passes == 0 and share // passes * mean <= budget)
    return next(fitting, share)


def _orders(count: int, epochs: float, seed: int) -> Iterator[list[int]]:
    """Each epoch's examples."""
    for epoch in range(math.ceil(epochs)):
        generator = torch.Generator().manual_seed((seed << 16) + epoch)
        order = torch.randperm(count, generator=generator).tolist()
        yield order[: max(1, round(len(order) * min(1.0, epochs - epoch)))]


def pack(order: Sequence[int], lengths: Sequence[int], budget: int, *, padded: bool = False) -> list[list[int]]:
    """`order` cut into batches, in order."""
    batches: list[list[int]] = []
    total = longest = 0
    for index in order:
        total, longest = total + lengths[index], max(longest, lengths[index])
        size = longest * (len(batches[-1]) + 1) if padded and batches else total
        if not batches or size > budget:
            batches.append([])
            total = longest = lengths[index]
        batches[-1].append(index)
    return batches
