"""Answers to held-out examples, for the task's metric: by the code that serves, on the base as it is served.

So the metric is of what users will get, and is measured at the server's speed. transformers writes for decoders'
adapters that are not served.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer

from onebase_contract.events import Part, Progress
from onebase_engine.base.base_spec import BaseSpec
from onebase_engine.base.catalog import fetch_base
from onebase_engine.base.load_base import end_tokens, plain_attention
from onebase_training.data import Encoded
from onebase_training.data.encoding.packing import pack
from onebase_training.evaluation import served
from onebase_training.evaluation.evaluation_result import Sample, room, sample
from onebase_training.model.trained_model import Trained

_BATCH_TOKENS = 4096
"""The size of transformers' cache: of the sequences that it writes at once, at the longest that they may become."""


def served_answers(
    spec: BaseSpec, adapter: Path | None, examples: Sequence[Encoded], *, max_new_tokens: int, progress: Progress
) -> list[Sample]:
    """Greedy answers of the adapter in a folder, or of the base alone. The base is loaded for it, and let go again.

    Raises AdapterError and its branches where the adapter is not served.
    """
    if not examples:
        return []
    tokenizer = AutoTokenizer.from_pretrained(fetch_base(spec.model))
    longest = max(len(example.input_ids) for example in examples) + max_new_tokens
    with served.serving(spec, longest, progress) as engine:
        virtual = served.load(engine, adapter).virtual_tokens if adapter is not None else 0
        return served.answers(
            engine,
            examples,
            tokenizer,
            adapted=adapter is not None,
            max_new_tokens=max_new_tokens,
            virtual=virtual,
            progress=progress,
        )


@torch.no_grad()
def model_answers(
    model: Trained, examples: Sequence[Encoded], tokenizer: Any, *, max_new_tokens: int, progress: Progress
) -> list[Sample]:
    """Greedy answers by transformers' `generate`, of the model as it was trained."""
    ends = frozenset(end_tokens(model.model, tokenizer.eos_token_id))
    limits = [room(example, max_new_tokens) for example in examples]
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


def _generate(model: Trained, examples: Sequence[Encoded], limit: int, ends: frozenset[int]) -> list[list[int]]:
    """Continue each prompt; they are padded on the left, so that all end in one column."""
    arranged = [model.collate.arrange(example)[0] for example in examples]
    prompts = [
        torch.tensor(tokens[: len(tokens) - (len(example.input_ids) - example.prompt_length)])
        for tokens, example in zip(arranged, examples, strict=True)
    ]
    ids = pad_sequence(prompts, batch_first=True, padding_side="left")
    seen = pad_sequence([torch.ones_like(prompt) for prompt in prompts], batch_first=True, padding_side="left")
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
    rows: list[list[int]] = made[:, ids.shape[1] :].tolist()
    return rows


@contextmanager
def _inference(model: Trained) -> Iterator[None]:
    """Evaluation mode, with an attention that knows padding and a cache."""
    base = model.model
    packed, training = base.config._attn_implementation, model.training
    base.set_attn_implementation(plain_attention(base))
    model.eval()
    try:
        yield
    finally:
        base.set_attn_implementation(packed)
        model.train(training)
