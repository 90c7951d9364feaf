"""What a run needs before it trains: data in two parts, the base in the method's format, token ids."""

from dataclasses import replace

import torch

from onebase_adapters.base import BaseSpec, LoadedBase, load_base
from onebase_adapters.base.load import resolve_device
from onebase_adapters.errors import ConfigError, DataError
from onebase_adapters.files import check_base, read_adapter
from onebase_adapters.vocabulary import check_folder
from onebase_training.config import TrainConfig
from onebase_training.data import Dataset, Encoded, encode, encode_for_head, read_dataset, read_datasets, split
from onebase_training.data.check import Check
from onebase_training.events import Progress, Stage
from onebase_training.fitting.estimate import free_memory
from onebase_training.methods import Method
from onebase_training.model.arithmetic import DTYPES, choose_arithmetic
from onebase_training.model.attached import Attached
from onebase_training.model.attention import PACKED_ATTENTION
from onebase_training.model.frozen import expand_in_passes, held_bytes, hold
from onebase_training.model.seq2seq import PAIRED_METHODS
from onebase_training.workspace import Workspace


def read_data(config: TrainConfig) -> tuple[Dataset, Dataset]:
    """Training part and held-out part. Raises DataError."""
    dataset = read_datasets(config.files, format=config.format)
    if unknown := config.label_words.keys() - set(dataset.labels):
        raise DataError(
            f"label_words names {min(unknown)!r}, which is no label of {dataset.source} "
            f"(there are {', '.join(dataset.labels) or 'none'}).",
            field="label_words",
        )
    dataset = dataset.with_words(config.label_words)
    if config.eval_data is None:
        return split(dataset, eval_fraction=config.eval_fraction, seed=config.seed)
    return dataset, read_dataset(config.eval_data, format=config.format).with_words(config.label_words)


def with_arithmetic(config: TrainConfig, workspace: Workspace, progress: Progress) -> TrainConfig:
    """With the arithmetic that suits the processor, or that the run to resume began with. Raises BaseModelError."""
    if config.resume and config.arithmetic is None:
        return replace(config, arithmetic=workspace.notes()["settings"].get("arithmetic", "bf16"))
    arithmetic, reason = choose_arithmetic(config.arithmetic, resolve_device(config.device))
    progress(Stage(f"arithmetic: {arithmetic} ({reason})"))
    return replace(config, arithmetic=arithmetic)


def describe(found: Check) -> list[str]:
    """What should be known of the data before it trains, in a few lines."""
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
    }
    told = [f"{count:,} {what}" for what, count in doubts.items() if count]
    return [*lines, f"careful: {'; '.join(told)} (onebase data check shows them)"] if told else lines


def load_for_training(config: TrainConfig, method: Method, progress: Progress) -> LoadedBase:
    """The base in the method's format, with the attention that fits the device."""
    spec = BaseSpec(config.model, quantization=method.quantization, device=config.device)
    threads = torch.get_num_threads()
    base = load_base(spec, progress=lambda text: progress(Stage(text)))
    # numba's OpenMP has made it the number of cores, whatever OMP_NUM_THREADS (torchrun's: 1) says.
    torch.set_num_threads(threads)
    if base.shape.encoder_decoder and (config.method not in PAIRED_METHODS or config.head):
        raise ConfigError(
            f"{config.model} is an encoder-decoder: it trains with {', '.join(PAIRED_METHODS)}, and no classifier.",
            field="head" if config.head else "method",
        )
    if base.device.type == "cpu" and not base.shape.encoder_decoder:
        base.model.set_attn_implementation(PACKED_ATTENTION)
    dtype = DTYPES[config.arithmetic or "bf16"]
    extra = held_bytes(base.model, dtype)
    expanded = method.expanded or config.spread_weights or bool(config.modules_to_save)
    if expanded and extra and config.dequantize == "never":
        raise ConfigError(
            f"{config.method} needs the base's weights expanded here.",
            field="dequantize",
        )
    roomy = config.dequantize == "auto" and dtype == torch.bfloat16 and extra * 4 <= free_memory(base.device)
    if extra and (expanded or config.dequantize == "always" or roomy):
        hold(base.model, dtype)
        progress(Stage(f"frozen weights held as {config.arithmetic}: the same values, {extra >> 20} MiB more"))
    elif extra:
        expand_in_passes(base.model, dtype)
        progress(Stage(f"frozen weights are expanded to {config.arithmetic} for each product"))
    return base


def encode_part(
    dataset: Dataset, base: LoadedBase, config: TrainConfig, classes: tuple[str, ...] = ()
) -> list[Encoded]:
    """For a classifier of `classes`, or without any for the language model. Raises DataError."""
    limit = min(config.max_length, base.shape.context)
    if classes:
        encoded = encode_for_head(
            dataset.examples, base.tokenizer, classes, max_length=limit, too_long=config.too_long
        )
    else:
        encoded = encode(dataset.examples, base.tokenizer, max_length=limit, too_long=config.too_long)
    if not encoded:
        raise DataError(f"No example of {dataset.source} has at most {limit} tokens.", field="max_length")
    return encoded


def start_from(attached: Attached, base: LoadedBase, config: TrainConfig) -> None:
    """Begin with `config.init_from`. Raises AdapterError and its branches, or ConfigError."""
    if config.init_from is None:
        return
    files = read_adapter(config.init_from)
    check_base(files, base.shape)
    check_folder(config.init_from, base.tokenizer.get_vocab())
    trained_by = files.sidecar.get("method", config.method)
    if attached.load is None or trained_by != config.method:
        raise ConfigError(
            f"{config.method} cannot start from an adapter of {trained_by}."
            if attached.load is not None
            else f"{config.method} cannot start from an adapter: what it trains is not what is stored.",
            field="init_from",
        )
    attached.load({name: value for name, value in files.tensors.items() if not name.startswith("score.")})


def check_room(attached: Attached, base: LoadedBase, longest: int) -> None:
    """Raises ConfigError where virtual tokens and the longest example exceed the base's context."""
    virtual = len(attached.places) + attached.prefix_length
    if longest + virtual > base.shape.context:
        raise ConfigError(
            f"{virtual} virtual tokens and the longest example's {longest} do not fit into the base's context of "
            f"{base.shape.context}. Use a smaller --prompt-length or --max-length.",
            field="prompt_length",
        )
