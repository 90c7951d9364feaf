"""Answers to held-out examples, for the task's metric: by the code that serves, on the base as it is served.

So the metric is of what users will get, and is measured at the server's speed. transformers writes where the server
cannot: for adapters that are not served, and for encoder-decoders, which it serves one request after another.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from onebase_adapters.lowering.lower import load_adapter
from onebase_adapters.primitives.virtual_tokens import Layout
from onebase_contract.events import Part, Progress, Stage
from onebase_engine.base.base_spec import BaseSpec
from onebase_engine.base.load_base import load_base
from onebase_engine.runner.batched_model import ServedModel
from onebase_engine.runner.paged_attention import ATTENTION_NAME, register_attention
from onebase_engine.text.stop_strings import first_stop
from onebase_training.data import NO_LOSS, Encoded
from onebase_training.data.encoding.packing import pack
from onebase_training.evaluation.evaluation_result import Sample
from onebase_training.evaluation.served import ServedRows
from onebase_training.model.trained_model import Trained

TOGETHER = 16
"""Sequences that the server's code writes at once."""
_BATCH_TOKENS = 4096
"""Of the sequences that transformers writes at once, at the longest that they may become: their cache's size."""
_VIRTUAL = 1024
"""Room for an adapter's virtual tokens. Pages that nobody writes take no memory."""


def room(longest: int) -> int:
    """Pages for as many sequences as are written at once, of at most `longest` tokens and an adapter's."""
    return ServedRows.blocks_for([longest + _VIRTUAL] * TOGETHER)


def asked(examples: Sequence[Encoded], count: int) -> list[Encoded]:
    """The first `count` that ask something: a text without a prompt has no answer to judge."""
    return [example for example in examples if example.prompt_length][:count]


def served_answers(
    spec: BaseSpec, adapter: Path | None, examples: Sequence[Encoded], *, max_new_tokens: int, progress: Progress
) -> list[Sample]:
    """Greedy answers of the adapter in a folder, or of the base alone. The base is loaded for it, and let go again.

    Raises AdapterError and its branches where the adapter is not served.
    """
    if not examples:
        return []
    threads = torch.get_num_threads()
    register_attention()
    base = load_base(spec, attention=ATTENTION_NAME, progress=lambda text: progress(Stage(text)))
    longest = max(len(example.input_ids) for example in examples) + max_new_tokens
    model = ServedModel(base, slots=1, blocks=room(longest), head="screened")
    rows, layout = ServedRows(model, 0, 0), Layout()
    if adapter is not None:
        lowered = load_adapter(adapter, adapter.name, base.shape, model.weights)
        rows, layout = ServedRows(model, model.put(lowered), lowered.layout.prefix), lowered.layout
    ends = ends_of(base.model, base.tokenizer)
    samples = write_answers(rows, layout, examples, base.tokenizer, ends, max_new_tokens, progress)
    torch.set_num_threads(threads)  # numba's OpenMP has made it the number of cores
    return samples


def write_answers(
    rows: ServedRows,
    layout: Layout,
    examples: Sequence[Encoded],
    tokenizer: Any,
    ends: frozenset[int],
    max_new_tokens: int,
    progress: Progress,
) -> list[Sample]:
    """Greedy answers of the model and adapter behind `rows`."""
    samples: dict[int, Sample] = {}
    limits = [_limit(example, max_new_tokens) for example in examples]
    order = sorted(range(len(examples)), key=limits.__getitem__)
    for start in range(0, len(order), TOGETHER):
        progress(Part(start, len(order), "answers"))
        group = order[start : start + TOGETHER]
        prompts = [layout.arrange(_prompt(examples[index]), rows.vocab) for index in group]
        made = rows.greedy(prompts, [limits[index] for index in group], ends)
        samples |= {
            index: sample(tokenizer, examples[index], written) for index, written in zip(group, made, strict=True)
        }
    return [samples[index] for index in range(len(examples))]


@torch.no_grad()
def model_answers(
    model: Trained, examples: Sequence[Encoded], tokenizer: Any, *, max_new_tokens: int, progress: Progress
) -> list[Sample]:
    """Greedy answers by transformers' `generate`, of the model as it was trained."""
    ends = ends_of(model.model, tokenizer)
    limits = [_limit(example, max_new_tokens) for example in examples]
    lengths = [model.length(example) + limit for example, limit in zip(examples, limits, strict=True)]
    order = sorted(range(len(examples)), key=limits.__getitem__)
    samples: dict[int, Sample] = {}
    with _inference(model):
        for group in pack(order, lengths, _BATCH_TOKENS, padded=True):
            progress(Part(len(samples), len(examples), "answers"))
            made = _generate(model, [examples[index] for index in group], max(limits[i] for i in group), ends)
            for index, row in zip(group, made, strict=True):
                end = next((at for at, token in enumerate(row) if token in ends), len(row))
                samples[index] = sample(tokenizer, examples[index], row[: min(end, limits[index])])
    return [samples[index] for index in range(len(examples))]


def _limit(example: Encoded, max_new_tokens: int) -> int:
    """A little more room than the wanted answer took."""
    return min(max_new_tokens, len(answer(example)) + 8)


def _prompt(example: Encoded) -> Sequence[int]:
    return example.input_ids[: example.prompt_length]


def _generate(model: Trained, examples: Sequence[Encoded], limit: int, ends: frozenset[int]) -> list[list[int]]:
    """What follows each prompt. A decoder's prompts are padded on the left, so that all end in one column."""
    arranged = [model.collate.arrange(example)[0] for example in examples]
    prompts = [
        torch.tensor(tokens[: len(tokens) - (len(example.input_ids) - example.prompt_length)])
        for tokens, example in zip(arranged, examples, strict=True)
    ]
    side = "right" if model.paired else "left"
    ids = pad_sequence(prompts, batch_first=True, padding_side=side)
    seen = pad_sequence([torch.ones_like(prompt) for prompt in prompts], batch_first=True, padding_side=side)
    base: Any = model.model
    with model.precision():
        made = base.generate(
            **model.embedded(ids.to(model.device)),
            attention_mask=seen.to(model.device),
            do_sample=False,
            max_new_tokens=limit,
            eos_token_id=sorted(ends),
            pad_token_id=min(ends),
        )
    rows: list[list[int]] = made[:, 1 if model.paired else ids.shape[1] :].tolist()
    return rows


@contextmanager
def _inference(model: Trained) -> Iterator[None]:
    """Evaluation mode, with an attention that knows padding and a cache."""
    base = model.model
    packed, training = base.config._attn_implementation, model.training
    if not model.paired:
        base.set_attn_implementation("sdpa")
    model.eval()
    try:
        yield
    finally:
        if not model.paired:
            base.set_attn_implementation(packed)
        model.train(training)


def sample(tokenizer: Any, example: Encoded, written: Sequence[int]) -> Sample:
    """What was written after the example's prompt, beside what was wanted; both up to what ends an answer."""
    texts = [example.input_ids[: example.prompt_length], answer(example), written]
    prompt, expected, generated = (tokenizer.decode(text, skip_special_tokens=True) for text in texts)
    return Sample(prompt, _cut(expected, example.stop), _cut(generated, example.stop))


def _cut(text: str, stops: Sequence[str]) -> str:
    found = first_stop(text, stops)
    return text if found is None else text[: found[1]]


def ends_of(model: PreTrainedModel, tokenizer: Any) -> frozenset[int]:
    """What ends an answer: the tokenizer's end of text, and what the model's own generation settings name."""
    named = model.generation_config.eos_token_id if model.generation_config else None
    ends = {*(named if isinstance(named, list) else [named]), tokenizer.eos_token_id}
    return frozenset(end for end in ends if end is not None)


def answer(example: Encoded) -> list[int]:
    """The tokens of the completion that `prompt_length` starts, with its end."""
    labels = example.labels[example.prompt_length :]
    return [label for label in labels if label != NO_LOSS]
