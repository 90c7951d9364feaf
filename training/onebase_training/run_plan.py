"""All that a run has decided before its first step, as one value that is made once: the method, the data in two
parts and as token ids, the base in the method's format, the batches, and the settings with every default resolved.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from onebase_adapters.errors import ConfigError, DataError
from onebase_contract.events import Progress, Stage
from onebase_contract.settings import Arithmetic, TrainConfig
from onebase_engine.base.base_spec import BaseSpec
from onebase_engine.base.load_base import LoadedBase
from onebase_engine.kernels.device import resolve_device
from onebase_training.data import Dataset, Encoded, encode_for_head, read_dataset, read_datasets, split
from onebase_training.data.data_check import Check, check, describe
from onebase_training.data.encoding.encode import encode_whole, fit
from onebase_training.data.encoding.packing import Batches, plan_run, tokens_of_pass
from onebase_training.data.task_kind import classes_of
from onebase_training.fitting.distributed import Ranks
from onebase_training.methods import classification_head as heads
from onebase_training.methods.attach import Method, find_method
from onebase_training.model.arithmetic import choose_arithmetic
from onebase_training.model.attached import Attached
from onebase_training.model.base_for_training import load_for_training
from onebase_training.model.trained_model import Trained


@dataclass(frozen=True)
class RunPlan:
    """Everything that a run needs, decided before it starts."""

    config: TrainConfig
    """With what it left open decided."""
    method: Method
    arithmetic: Arithmetic
    base: LoadedBase
    dataset: Dataset
    """The training part."""
    held_out: Dataset
    examples: Sequence[Encoded]
    evaluation: Sequence[Encoded]
    """The held-out part."""
    batches: Batches
    found: Check
    """The findings about the data."""

    @property
    def digests(self) -> dict[str, str]:
        """Which data it is."""
        return {"train": self.dataset.digest, "held_out": self.held_out.digest}

    @property
    def served(self) -> BaseSpec:
        """The base as users of the result have it."""
        return BaseSpec(self.config.model, device=self.config.device)

    def trained(self, attached: Attached) -> Trained:
        """The base with a method's parameters, as it learns."""
        return Trained(
            attached, self.base.device, first_position=self.base.shape.first_position, arithmetic=self.arithmetic
        )

    def notes(self) -> dict[str, Any]:
        """The notes on the run in `onebase.json`."""
        shape = self.base.shape
        base = {"model": self.config.model, "hub_id": shape.hub_id, "fingerprint": shape.fingerprint}
        sizes = {"format": self.dataset.format, "examples": len(self.dataset)}
        sizes |= {"held_out_examples": len(self.held_out)}
        sizes |= {"near_duplicates": sum(map(len, self.found.duplicates)), "leaks": len(self.found.leaks)}
        return {
            "base": {**base, "quantization": self.base.held if self.base.coded else self.method.quantization},
            "method": self.config.method,
            "data": {**self.digests, **sizes},
            "settings": self.config.settings(),
        }


def make_plan(
    config: TrainConfig, progress: Progress, ranks: Ranks, *, unfinished: Mapping[str, Any] | None = None
) -> RunPlan:
    """Read the data and load the base. `unfinished`: the settings of the run that goes on.

    Raises ConfigError, DataError or BaseModelError.
    """
    method = find_method(config.method)
    arithmetic = _arithmetic(config, unfinished, progress)
    dataset, held_out = read_data(config)
    base = load_for_training(config, method.quantization, arithmetic, progress, expanded=method.expanded)
    head = config.head or method.head or base.shape.encoder
    if method.attach is None and head:
        raise ConfigError(f"{config.method} has no parameters, and so no classifier.", field="method")
    limit = min(config.max_length, base.shape.context)
    sequences = encode_whole(dataset.examples, base.tokenizer)
    found = check(dataset, sequences, max_length=limit, held_out=held_out, samples=0)
    for line in describe(found):
        progress(Stage(line))
    if head:
        classes = classes_of(dataset)
        examples, evaluation = (_for_head(part, base, config, limit, classes) for part in (dataset, held_out))
    else:
        examples = fit(sequences, limit, config.too_long)
        evaluation = fit(encode_whole(held_out.examples, base.tokenizer), limit, config.too_long)
    for part, encoded in ((dataset, examples), (held_out, evaluation)):
        if not encoded:
            raise DataError(f"No example of {part.source} has at most {limit} tokens.", field="max_length")
    lengths = [len(one.input_ids) for one in examples]
    batches = plan_run(lengths, config, world=ranks.world, padded=base.shape.encoder_decoder)
    tokens = tokens_of_pass(lengths, config)
    decided = _with_rates(config, method, arithmetic=arithmetic, head=head, batch_tokens=tokens)
    return RunPlan(decided, method, arithmetic, base, dataset, held_out, examples, evaluation, batches, found)


def read_data(config: TrainConfig) -> tuple[Dataset, Dataset]:
    """Training part and held-out part. Raises DataError."""
    dataset = read_datasets(config.files, format=config.format, skip_bad=config.skip_bad)
    if unknown := config.label_words.keys() - set(dataset.labels):
        raise DataError(
            f"label_words names {min(unknown)!r}, which is no label of {dataset.source} "
            f"(there are {', '.join(dataset.labels) or 'none'}).",
            field="label_words",
        )
    dataset = dataset.with_words(config.label_words)
    if config.eval_data is None:
        return split(dataset, eval_fraction=config.eval_fraction, seed=config.seed)
    held_out = read_dataset(config.eval_data, format=config.format, skip_bad=config.skip_bad)
    return dataset, held_out.with_words(config.label_words)


def check_room(attached: Attached, base: LoadedBase, longest: int) -> None:
    """Raises ConfigError where virtual tokens and the longest example exceed the base's context."""
    virtual = len(attached.places) + attached.prefix_length
    if longest + virtual > base.shape.context:
        raise ConfigError(
            f"{virtual} virtual tokens and the longest example's {longest} do not fit into the base's context of "
            f"{base.shape.context}. Use a smaller --prompt-length or --max-length.",
            field="prompt_length",
        )


def _arithmetic(config: TrainConfig, unfinished: Mapping[str, Any] | None, progress: Progress) -> Arithmetic:
    """Return the arithmetic that the run to resume began with, or that suits the processor."""
    if unfinished is not None and config.arithmetic is None:
        begun: Arithmetic = unfinished.get("arithmetic", "bf16")
        return begun
    arithmetic, reason = choose_arithmetic(config.arithmetic, resolve_device(config.device))
    progress(Stage(f"arithmetic: {arithmetic} ({reason})"))
    return arithmetic


def _for_head(
    part: Dataset, base: LoadedBase, config: TrainConfig, limit: int, classes: tuple[str, ...]
) -> list[Encoded]:
    return encode_for_head(part.examples, base.tokenizer, classes, max_length=limit, too_long=config.too_long)


def _with_rates(config: TrainConfig, method: Method, **decided: Any) -> TrainConfig:
    """With what is decided, and the learning rates as they will be. Raises ConfigError."""
    of_head = heads.LEARNING_RATE if config.head_learning_rate is None else config.head_learning_rate
    rate = method.learning_rate if config.learning_rate is None else config.learning_rate
    factor = config.learning_rate_multiplier
    return replace(
        config,
        learning_rate=rate and rate * factor,
        head_learning_rate=of_head * factor,
        learning_rate_multiplier=1.0,
        **decided,
    )
