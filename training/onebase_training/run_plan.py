"""What a run needs before it trains: data in two parts, the base in the method's format, token ids."""

from collections.abc import Sequence
from dataclasses import replace

from onebase_adapters.errors import ConfigError, DataError
from onebase_contract.events import Progress, Stage
from onebase_contract.run_folder import Workspace
from onebase_contract.settings import TrainConfig
from onebase_engine.base.load_base import LoadedBase
from onebase_engine.kernels.device import resolve_device
from onebase_training.data import Dataset, Encoded, encode_for_head, read_dataset, read_datasets, split
from onebase_training.data.encoding.encode import encode_whole, fit
from onebase_training.model.arithmetic import choose_arithmetic
from onebase_training.model.attached import Attached


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


def with_arithmetic(config: TrainConfig, workspace: Workspace, progress: Progress) -> TrainConfig:
    """With the arithmetic that suits the processor, or that the run to resume began with. Raises BaseModelError."""
    if config.resume and config.arithmetic is None:
        return replace(config, arithmetic=workspace.notes()["settings"].get("arithmetic", "bf16"))
    arithmetic, reason = choose_arithmetic(config.arithmetic, resolve_device(config.device))
    progress(Stage(f"arithmetic: {arithmetic} ({reason})"))
    return replace(config, arithmetic=arithmetic)


def encode_part(
    dataset: Dataset,
    base: LoadedBase,
    config: TrainConfig,
    classes: tuple[str, ...] = (),
    sequences: Sequence[Encoded] | None = None,
) -> list[Encoded]:
    """For a classifier of `classes`, or without any for the language model, whose `sequences` may be known whole
    already. Raises DataError."""
    limit = min(config.max_length, base.shape.context)
    if classes:
        encoded = encode_for_head(
            dataset.examples, base.tokenizer, classes, max_length=limit, too_long=config.too_long
        )
    else:
        whole = encode_whole(dataset.examples, base.tokenizer) if sequences is None else sequences
        encoded = fit(whole, limit, config.too_long)
    if not encoded:
        raise DataError(f"No example of {dataset.source} has at most {limit} tokens.", field="max_length")
    return encoded


def check_room(attached: Attached, base: LoadedBase, longest: int) -> None:
    """Raises ConfigError where virtual tokens and the longest example exceed the base's context."""
    virtual = len(attached.places) + attached.prefix_length
    if longest + virtual > base.shape.context:
        raise ConfigError(
            f"{virtual} virtual tokens and the longest example's {longest} do not fit into the base's context of "
            f"{base.shape.context}. Use a smaller --prompt-length or --max-length.",
            field="prompt_length",
        )


def _with_peaks(config: TrainConfig) -> TrainConfig:
    """With the learning rates as they will be. Raises ConfigError."""
    factor = config.learning_rate_multiplier
    peak, of_head = (rate and rate * factor for rate in (config.learning_rate, config.head_learning_rate))
    return replace(config, learning_rate=peak, head_learning_rate=of_head, learning_rate_multiplier=1.0)
