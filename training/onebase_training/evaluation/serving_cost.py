"""The cost of serving an adapter: the time of a token beside the base's, measured, and the context it takes.

Two batches of the same prompts, one with the adapter and one without, are run in turns, each round writing the same
token again. A round's two times are compared, and the median is taken: a machine that is busy with other work is so
for both. The token is not chosen from the last hidden states: how long that takes depends on how sure the model is.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import median

from onebase_adapters.errors import AdapterError
from onebase_adapters.lowering.lower import load_adapter
from onebase_adapters.primitives.instruction_set import Head, Template
from onebase_adapters.primitives.lowered_adapter import LoweredAdapter
from onebase_engine.base.base_spec import BaseSpec
from onebase_engine.base.load_base import LoadedBase, load_base
from onebase_engine.base.model_weights import ModelWeights
from onebase_engine.kernels.batch import BLOCK
from onebase_engine.runner.batched_model import ServedModel
from onebase_engine.runner.batching import Chunk
from onebase_engine.runner.paged_attention import ATTENTION_NAME, register_attention
from onebase_training.data import Example, encode, encode_for_head
from onebase_training.data.encoding.encode_template import encode_with

STREAMS = 16
"""Most requests of the batch."""
_ROUNDS = 43
_WARM_UP = 3
"""Rounds that are not counted."""


@dataclass(frozen=True)
class ServingCost:
    """The cost of serving one adapter."""

    times: float | None
    """Time of a token of a batch of requests, as a multiple of the base's. None: refused, or not measured."""
    context: int
    """Tokens of the context that each request gives up."""
    refused: str = ""
    """Why it is not served, if it is not."""


def serving_cost(folder: Path, spec: BaseSpec, examples: Sequence[Example]) -> ServingCost:
    """Measure the cost of the adapter in `folder` on the base as it is served, by the first of `examples`. Raises
    BaseModelError."""
    register_attention()
    base = load_base(spec, attention=ATTENTION_NAME)
    try:
        lowered = load_adapter(folder, folder.name, base.shape, ModelWeights(base.model))
    except AdapterError as error:
        return ServingCost(None, 0, str(error))
    prompts, plain = _prompts(lowered, base, examples[:STREAMS])
    if not prompts:
        return ServingCost(None, lowered.layout.tokens)
    shown = (sum(map(len, prompts)) - sum(map(len, plain))) // len(plain)
    if base.shape.encoder_decoder:
        return ServingCost(None, shown)
    count = sum(_pages(prompt) for prompt in (*prompts, *plain))
    model = ServedModel(base, slots=1, blocks=count)
    blocks = iter(range(count))
    batches = _Batch(model, plain, 0, blocks), _Batch(model, prompts, model.put(lowered), blocks)
    seconds = [[batch.seconds() for batch in batches] for _ in range(_ROUNDS)]
    return ServingCost(median(adapted / bare for bare, adapted in seconds[_WARM_UP:]), shown)


def _prompts(
    lowered: LoweredAdapter, base: LoadedBase, examples: Sequence[Example]
) -> tuple[list[list[int]], list[list[int]]]:
    """Return the tokens that are read for each example, virtual ones included: with the adapter, and without it."""
    tokenizer, limit, vocab = base.tokenizer, base.shape.context, base.shape.vocab
    head, template = lowered.one(Head), lowered.one(Template)
    if head is not None:
        labelled = encode_for_head(examples, tokenizer, list(head.labels), max_length=limit, too_long="skip")
        plain = [list(one.input_ids) for one in labelled]
    else:
        encoded = [encode([one], tokenizer, max_length=limit, too_long="skip")[-1:] for one in examples]
        plain = [list(last.input_ids[: last.prompt_length]) for found in encoded for last in found]
    if template is None:
        return [lowered.layout.arrange(prompt, vocab) for prompt in plain], plain
    shown = encode_with(template, examples, tokenizer, limit) or []
    return [list(one.input_ids[: one.prompt_length]) for one in shown], plain


def _pages(prompt: Sequence[int]) -> int:
    """Pages that hold it and one token more."""
    return len(prompt) // BLOCK + 1


class _Batch:
    """Streams of one adapter, whose next token can be computed again and again."""

    def __init__(self, model: ServedModel, prompts: Sequence[list[int]], slot: int, blocks: Iterator[int]) -> None:
        self._model = model
        tables = [list(islice(blocks, _pages(prompt))) for prompt in prompts]
        if model.shape.encoder:
            self._chunks = [Chunk(prompt, 0, table, slot) for prompt, table in zip(prompts, tables, strict=True)]
            return
        for prompt, table in zip(prompts, tables, strict=True):
            model.forward([Chunk(prompt, 0, table, slot)])
        self._chunks = [
            Chunk(prompt[-1:] if prompt[-1] < model.shape.vocab else [0], len(prompt), table, slot)
            for prompt, table in zip(prompts, tables, strict=True)
        ]

    def seconds(self) -> float:
        start = time.perf_counter()
        self._model.forward(self._chunks).hidden(range(len(self._chunks))).tolist()
        return time.perf_counter() - start
