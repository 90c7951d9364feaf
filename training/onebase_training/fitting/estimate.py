"""The time and memory of a run, measured beforehand: a short row goes forth and back once, and is extrapolated."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from onebase_adapters.errors import ConfigError
from onebase_contract.settings import TrainConfig
from onebase_engine.kernels.device import _taken_memory, free_memory
from onebase_training.data import NO_LOSS, Encoded
from onebase_training.model.trained_model import Trained, trainable_state

_PROBE_TOKENS = 256
_HEADROOM = 1.5
"""Buffers of a moment, beside what is kept for the backward pass."""
_LOGIT_BYTES = 14
"""Bytes of one logit: bfloat16, float32, and the gradients of both."""


@dataclass(frozen=True)
class Estimate:
    """The time and memory that a run is expected to take."""

    seconds: float
    """Seconds of training; evaluations come on top."""
    memory: int
    """Bytes that are still to be taken. Evaluations, in passes of the same size, need less than training."""
    taken: int
    """Bytes that are taken already: libraries and the base; on a GPU, what is on it."""

    def __str__(self) -> str:
        took = f"{self.seconds / 60:.0f} min" if self.seconds > 90 else f"{self.seconds:.0f} s"
        return f"about {took} and {_gib(self.taken + self.memory)} of memory in all"


@dataclass(frozen=True)
class _Probe:
    seconds_per_token: float
    bytes_per_token: float


def settle(
    model: Trained, examples: Sequence[Encoded], plan: Sequence[Sequence[int]], config: TrainConfig
) -> tuple[Estimate, bool]:
    """The estimate, and whether activations are to be recomputed, which this has switched on then.

    Raises ConfigError where the largest batch does not fit into memory.
    """
    probe_rows = _short_rows(examples, plan[0])
    checkpointed = config.checkpointing == "always"
    if checkpointed:
        model.recompute_activations()
    free, taken = free_memory(model.device), _taken_memory(model.device)

    def estimated() -> Estimate:
        return _estimate(_probe(model, probe_rows), model, examples, plan, taken)

    estimate = estimated()
    if estimate.memory > free and config.checkpointing == "auto":
        model.recompute_activations()
        checkpointed = True
        estimate = estimated()
    if estimate.memory > free:
        raise ConfigError(
            f"The largest batch needs some {_gib(estimate.memory)} of memory, {_gib(free)} are free. Use a smaller "
            f"--batch-tokens (now {config.batch_tokens}), shorter examples (--max-length)"
            f"{'' if checkpointed else ', or --checkpointing always'}.",
            field="batch_tokens",
        )
    return estimate, checkpointed


def _short_rows(examples: Sequence[Encoded], batch: Sequence[int]) -> list[Encoded]:
    chosen: list[Encoded] = []
    for index in batch:
        chosen.append(examples[index])
        if sum(len(one.input_ids) for one in chosen) >= _PROBE_TOKENS:
            break
    return chosen


def _probe(model: Trained, rows: Sequence[Encoded]) -> _Probe:
    """Twice: the first pass counts what autograd keeps, the second is timed."""
    batch = {name: value.to(model.device) for name, value in model.collate(rows).items()}
    tokens, logits = sum(map(model.length, rows)), batch["labels"].numel() * model.outputs
    own = {value.untyped_storage().data_ptr() for value in model.parameters()}
    kept: dict[int, int] = {}

    def keep(value: torch.Tensor) -> torch.Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return value

    model.train()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        loss = model(**batch)
    loss.backward()
    start = time.perf_counter()
    model(**batch).backward()
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    seconds = time.perf_counter() - start
    model.zero_grad()
    activations = max(0, sum(kept.values()) - 4 * logits)
    return _Probe(seconds / tokens, activations / tokens)


def _estimate(
    probe: _Probe,
    model: Trained,
    examples: Sequence[Encoded],
    plan: Sequence[Sequence[int]],
    taken: int,
) -> Estimate:
    batches = [[examples[index] for index in batch] for batch in plan]
    tokens = [sum(map(model.length, batch)) for batch in batches]
    labels = [sum(len(one.labels) - one.labels.count(NO_LOSS) for one in batch) for batch in batches]
    largest = max(
        probe.bytes_per_token * token_count + _LOGIT_BYTES * model.outputs * label_count
        for token_count, label_count in zip(tokens, labels, strict=True)
    )
    trained = sum(value.numel() for value in trainable_state(model).values())
    # Gradient and both of Adam's moments, float32.
    memory = _HEADROOM * largest + 12 * trained
    return Estimate(probe.seconds_per_token * sum(tokens), int(memory), taken)


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"
