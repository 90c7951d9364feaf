"""`onebase evaluate`: an adapter's marks and its base's, by the code that serves them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

from onebase_adapters.errors import AdapterFormatError, ConfigError
from onebase_adapters.formats.checks import check_folder
from onebase_adapters.formats.read_adapter import read_adapter
from onebase_adapters.lowering.lower import load_adapter
from onebase_adapters.primitives.instruction_set import Head, Template
from onebase_adapters.primitives.lowered_adapter import LoweredAdapter
from onebase_adapters.primitives.virtual_tokens import Layout
from onebase_contract.events import Part, Progress, Stage, silent
from onebase_engine.base.base_spec import BaseSpec
from onebase_engine.base.load_base import load_base
from onebase_engine.runner.batched_model import ServedModel
from onebase_engine.runner.classifier_heads import probabilities
from onebase_engine.runner.paged_attention import ATTENTION_NAME, register_attention
from onebase_training.data import NO_LOSS, Dataset, Encoded, encode, encode_for_head, read_dataset
from onebase_training.data.encoding.encode_template import encode_with
from onebase_training.evaluation.answers import asked, ends_of, room, write_answers
from onebase_training.evaluation.evaluation_result import Evaluation, Sample, mark
from onebase_training.evaluation.served import ServedRows


@dataclass(frozen=True)
class EvaluateConfig:
    """What is scored, and on what."""

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


@dataclass(frozen=True)
class Scored:
    """Both marks, on the same examples. A head has no counterpart in the base."""

    base: Evaluation | None
    adapter: Evaluation | None


def evaluate_served(config: EvaluateConfig, progress: Progress = silent) -> Scored:
    """Raises DataError, AdapterError and its branches, or BaseModelError."""
    dataset = read_dataset(config.data, format=config.format)
    if config.adapter is not None:
        files = read_adapter(config.adapter)  # refuse a bad one before the base is loaded
        dataset = dataset.with_words(files.sidecar.get("settings", {}).get("label_words") or {})
    register_attention()
    base = load_base(config.base, attention=ATTENTION_NAME, progress=lambda text: progress(Stage(text)))
    limit = min(config.max_length, base.shape.context)
    model = ServedModel(base, slots=1, blocks=room(limit + config.max_new_tokens))
    lowered = None
    if config.adapter is not None:
        check_folder(config.adapter, base.tokenizer.get_vocab())
        lowered = load_adapter(config.adapter, config.adapter.name, base.shape, model.weights)
    head = lowered.one(Head) if lowered else None
    if base.shape.encoder and head is None:
        raise ConfigError("An encoder without a classifier writes nothing that could be scored.", field="adapter")
    plain = None
    if head is None:
        progress(Stage("measuring the base"))
        examples = encode(dataset.examples, base.tokenizer, max_length=limit)
        plain = _write(ServedRows(model, 0, 0), Layout(), examples, config, model, progress)
    if lowered is None:
        return Scored(plain, None)
    progress(Stage("measuring the adapter"))
    return Scored(plain, _measure(model, lowered, head, dataset, config, limit, progress))


def _measure(
    model: ServedModel,
    lowered: LoweredAdapter,
    head: Head | None,
    dataset: Dataset,
    config: EvaluateConfig,
    limit: int,
    progress: Progress,
) -> Evaluation:
    tokenizer = model.base.tokenizer
    rows = ServedRows(model, model.put(lowered), lowered.layout.prefix)
    if head is not None:
        classes = list(head.labels)
        labelled = encode_for_head(dataset.examples, tokenizer, classes, max_length=limit)
        return _classify(rows, lowered.layout, head, labelled, model, progress)
    found = lowered.one(Template)
    if found is None:
        examples = encode(dataset.examples, tokenizer, max_length=limit)
    else:
        shown = encode_with(found, dataset.examples, tokenizer, limit)
        if shown is None:
            raise AdapterFormatError("The template leaves no room for the longest example.", field="adapter")
        examples = shown
    return _write(rows, lowered.layout, examples, config, model, progress)


def _write(
    rows: ServedRows,
    layout: Layout,
    examples: Sequence[Encoded],
    config: EvaluateConfig,
    model: ServedModel,
    progress: Progress,
) -> Evaluation:
    """Loss of what the examples say, and the score of what the model writes instead."""
    vocab, tokenizer = model.shape.vocab, model.base.tokenizer
    total, learned = 0.0, 0
    for number, one in enumerate(examples):
        progress(Part(number, len(examples), "examples"))
        end = one.prompt_length
        order = layout.arrange(range(end), end)  # places of the prompt, and virtual tokens from `end` on
        tokens = [one.input_ids[at] if at < end else vocab + at - end for at in order] + list(one.input_ids[end:])
        labels = [one.labels[at] if at < end else NO_LOSS for at in order] + list(one.labels[end:])
        places = [at for at, label in enumerate(labels) if label != NO_LOSS and at]
        logits = rows.logits(tokens, [at - 1 for at in places])
        wanted = torch.tensor([labels[at] for at in places], device=logits.device)
        total += float(cross_entropy(logits, wanted, reduction="sum"))
        learned += len(places)
    ends = ends_of(model.base.model, tokenizer)
    chosen = asked(examples, config.metric_examples)
    samples = write_answers(rows, layout, chosen, tokenizer, ends, config.max_new_tokens, progress)
    return Evaluation(total / learned, mark(samples, examples), samples)


def _classify(
    rows: ServedRows,
    layout: Layout,
    head: Head,
    examples: Sequence[Encoded],
    model: ServedModel,
    progress: Progress,
) -> Evaluation:
    total, learned = 0.0, 0
    samples = []
    for number, one in enumerate(examples):
        progress(Part(number, len(examples), "examples"))
        # A classifier's virtual tokens stand before the text, or after it.
        tokens = layout.arrange(one.input_ids, model.shape.vocab)
        own = [at for at, token in enumerate(tokens) if token < model.shape.vocab]
        hidden = rows.hidden(tokens, own)
        found = probabilities(head, hidden)
        labels = {at: label for at, label in enumerate(one.labels) if label != NO_LOSS}
        guesses = []
        for at, label in labels.items():
            row = found[0 if head.kind == "sequence" else at]
            total -= float(torch.tensor(row[label]).log())
            guesses.append(head.labels[max(range(len(row)), key=row.__getitem__)])
        learned += len(labels)
        expected = " ".join(head.labels[label] for label in labels.values())
        prompt = model.base.tokenizer.decode(one.input_ids, skip_special_tokens=True)
        samples.append(Sample(prompt, expected, " ".join(guesses)))
    return Evaluation(total / learned, mark(samples, examples), samples)
