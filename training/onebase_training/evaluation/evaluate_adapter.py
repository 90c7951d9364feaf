"""`onebase evaluate`: an adapter's marks and its base's, by the engine that serves them."""

import math
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from onebase_adapters.errors import AdapterFormatError, ConfigError
from onebase_adapters.formats.checks import check_folder
from onebase_adapters.formats.read_adapter import read_adapter
from onebase_contract.events import Progress, Stage, silent
from onebase_engine.base.base_spec import BaseSpec
from onebase_engine.base.catalog import fetch_base
from onebase_engine.engine import Engine
from onebase_engine.engine_info import AdapterInfo, HeadInfo
from onebase_training.data import NO_LOSS, Dataset, Encoded, encode, encode_for_head, read_dataset
from onebase_training.data.encoding.encode_template import encode_with
from onebase_training.evaluation import served
from onebase_training.evaluation.evaluation_result import Evaluation, Sample, asked, mark


@dataclass(frozen=True)
class EvaluateConfig:
    """The settings of an evaluation: what is scored, and on which examples."""

    data: Path
    """Examples in any format that training reads."""
    base: BaseSpec = field(default_factory=BaseSpec)
    """As it is to be served."""
    adapter: Path | None = None
    """Its folder. None: the bare base alone."""
    format: str | None = None
    """The data's; None: recognised from its columns."""
    max_length: int = 1024
    """Longer examples raise DataError."""
    metric_examples: int = 200
    """Examples that are generated for the metric; the loss is of all. 0: none."""
    max_new_tokens: int = 128
    """Most tokens generated for one."""
    skip_bad: bool = False
    """Leave out records that cannot be used."""


@dataclass(frozen=True)
class Scored:
    """Both marks, on the same examples. A head has no counterpart in the base."""

    base: Evaluation | None
    adapter: Evaluation | None


def evaluate_served(config: EvaluateConfig, progress: Progress = silent) -> Scored:
    """Raises DataError, AdapterError and its branches, ConfigError or BaseModelError."""
    dataset = read_dataset(config.data, format=config.format, skip_bad=config.skip_bad)
    if config.adapter is not None:
        files = read_adapter(config.adapter)  # refuse a bad one before the base is loaded
        dataset = dataset.with_words(files.sidecar.get("settings", {}).get("label_words") or {})
    folder = fetch_base(config.base.model, progress=lambda text: progress(Stage(text)))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with served.serving(config.base, config.max_length + config.max_new_tokens, progress) as engine:
        info = None
        if config.adapter is not None:
            check_folder(config.adapter, tokenizer.get_vocab())
            info = served.load(engine, config.adapter)
        if not engine.info.generates and (info is None or info.head is None):
            raise ConfigError(
                "An encoder without a classifier writes nothing that could be scored.", field="adapter"
            )
        limit = min(config.max_length, engine.info.context)
        plain = None
        if info is None or info.head is None:
            progress(Stage("measuring the base"))
            examples = encode(dataset.examples, tokenizer, max_length=limit)
            plain = _write(engine, examples, config, tokenizer, None, progress)
        if info is None:
            return Scored(plain, None)
        progress(Stage("measuring the adapter"))
        return Scored(plain, _measure(engine, info, dataset, config, tokenizer, limit, progress))


def _measure(
    engine: Engine,
    info: AdapterInfo,
    dataset: Dataset,
    config: EvaluateConfig,
    tokenizer: Any,
    limit: int,
    progress: Progress,
) -> Evaluation:
    if info.chat_template is not None:  # chats with it go through its own
        tokenizer = copy(tokenizer)
        tokenizer.chat_template = info.chat_template
    if info.head is not None:
        labelled = encode_for_head(dataset.examples, tokenizer, list(info.head.labels), max_length=limit)
        return _classify(engine, info.head, labelled, tokenizer, progress)
    if info.template is None:
        examples = encode(dataset.examples, tokenizer, max_length=limit)
        return _write(engine, examples, config, tokenizer, info, progress)
    shown = encode_with(served.template_of(info.template), dataset.examples, tokenizer, limit)
    if shown is None:
        raise AdapterFormatError("The template leaves no room for the longest example.", field="adapter")
    return _write(engine, shown, config, tokenizer, None, progress)  # it is text, and changes nothing else


def _write(
    engine: Engine,
    examples: Sequence[Encoded],
    config: EvaluateConfig,
    tokenizer: Any,
    info: AdapterInfo | None,
    progress: Progress,
) -> Evaluation:
    """Loss of what the examples say, and the score of what is written instead. `info`: the adapter's; else the
    base's."""
    loss = served.loss(engine, examples, adapted=info is not None, progress=progress)
    samples = served.answers(
        engine,
        asked(examples, config.metric_examples),
        tokenizer,
        adapted=info is not None,
        max_new_tokens=config.max_new_tokens,
        virtual=info.virtual_tokens if info is not None else 0,
        progress=progress,
    )
    return Evaluation(loss, mark(samples, examples), samples)


def _classify(
    engine: Engine, head: HeadInfo, examples: Sequence[Encoded], tokenizer: Any, progress: Progress
) -> Evaluation:
    total, learned = 0.0, 0
    samples = []
    for one, found in zip(examples, served.labels(engine, examples, progress), strict=True):
        labels = {at: label for at, label in enumerate(one.labels) if label != NO_LOSS}
        guesses = []
        for at, label in labels.items():
            row = found[0 if head.kind == "sequence" else at]
            total -= math.log(row[label])
            guesses.append(head.labels[max(range(len(row)), key=row.__getitem__)])
        learned += len(labels)
        expected = " ".join(head.labels[label] for label in labels.values())
        prompt = tokenizer.decode(one.input_ids, skip_special_tokens=True)
        samples.append(Sample(prompt, expected, " ".join(guesses)))
    return Evaluation(total / learned, mark(samples, examples), samples)
