"""What serving an adapter costs: the time of a token beside the base's, measured, and the context it takes.

Two batches of the same texts, one with the adapter and one without, are run in turns, each round writing the same
token again. The quickest rounds are compared: other programs only ever make a round slower.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onebase_adapters.base import BaseSpec, load_base
from onebase_adapters.batch import Chunk
from onebase_adapters.errors import AdapterError
from onebase_adapters.methods import load_adapter
from onebase_adapters.model.paged import ATTENTION_NAME, register_attention
from onebase_adapters.model.served import ServedModel
from onebase_adapters.model.weights import ModelWeights
from onebase_adapters.primitives import Template
from onebase_training.served import ServedRows

_STREAMS = 16
_TEXT = 64
"""Tokens of each stream before the one that is timed, the adapter's own not counted."""
_ROUNDS = 20


@dataclass(frozen=True)
class ServingCost:
    """Of one adapter."""

    times: float | None
    """Time of a token of 16 requests in a batch, as a multiple of the base's. None: refused, or not measured."""
    context: int
    """Tokens of the context that each request gives up."""
    refused: str = ""
    """Why it is not served, if it is not."""


def serving_cost(folder: Path, spec: BaseSpec) -> ServingCost:
    """Of the adapter in `folder` on the base as it is served. Raises BaseModelError."""
    register_attention()
    base = load_base(spec, attention=ATTENTION_NAME)
    try:
        lowered = load_adapter(folder, folder.name, base.shape, ModelWeights(base.model))
    except AdapterError as error:
        return ServingCost(None, 0, str(error))
    layout, template = lowered.layout, lowered.one(Template)
    shown = _shown(template, base.tokenizer) if template else 0
    context = layout.tokens + shown
    if base.shape.encoder_decoder:
        return ServingCost(None, context)
    length = _TEXT + context + 1
    each = ServedRows.blocks_for([length])
    model = ServedModel(base, slots=1, blocks=2 * _STREAMS * each)
    slot = model.put(lowered)
    prompt = [0] * _TEXT
    batches = [
        _Batch(model, prompt, 0, range(_STREAMS * each)),
        _Batch(
            model, layout.arrange(prompt + [0] * shown, base.shape.vocab), slot,
            range(_STREAMS * each, 2 * _STREAMS * each),
        ),
    ]  # fmt: skip
    plain, adapted = [], []
    for _ in range(_ROUNDS):
        plain.append(batches[0].seconds())
        adapted.append(batches[1].seconds())
    return ServingCost(min(adapted[2:]) / min(plain[2:]), context)


class _Batch:
    """Streams of one text and one adapter, whose next token can be computed again and again."""

    def __init__(self, model: ServedModel, prompt: list[int], slot: int, blocks: range) -> None:
        self._model = model
        each = len(blocks) // _STREAMS
        tables = [list(blocks[start : start + each]) for start in range(0, len(blocks), each)]
        if model.shape.encoder:
            self._chunks = [Chunk(prompt, 0, table, slot) for table in tables]
            return
        for table in tables:
            model.forward([Chunk(prompt, 0, table, slot)])
        self._chunks = [Chunk([0], len(prompt), table, slot) for table in tables]

    def seconds(self) -> float:
        start = time.perf_counter()
        scores = self._model.forward(self._chunks)
        if self._model.shape.encoder:
            scores.hidden(range(len(self._chunks))).tolist()
        else:
            scores.best(range(len(self._chunks)))
        return time.perf_counter() - start


def _shown(template: Template, tokenizer: Any) -> int:
    """Tokens of a template's own text; without the marks between turns, which are the base's."""
    texts = [template.before, template.after, *(turn["content"] for turn in template.messages)]
    return sum(len(tokenizer.encode(text, add_special_tokens=False)) for text in texts if text)
