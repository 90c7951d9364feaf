"""Greedy generation in padded batches, for the metric before and after training."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from onebase_training.data.batches import pack
from onebase_training.model.seq2seq import answers
from onebase_training.model.trained import Trained

_BATCH_TOKENS = 4096
"""Of the sequences that are written at once, at the longest that they may become: what their cache holds."""


@torch.no_grad()
def generate(
    model: Trained, prompts: Sequence[Sequence[int]], *, max_new_tokens: Sequence[int], ends: frozenset[int]
) -> list[list[int]]:
    """The tokens that follow each prompt, up to (not with) one of `ends`, at most its own `max_new_tokens`.

    Prompts hold an adapter's virtual tokens already.
    """
    order = sorted(range(len(prompts)), key=lambda index: (max_new_tokens[index], len(prompts[index])))
    made: dict[int, list[int]] = {}
    lengths = [len(prompt) + limit for prompt, limit in zip(prompts, max_new_tokens, strict=True)]
    with inference(model):
        for chosen in pack(order, lengths, _BATCH_TOKENS, padded=True):
            limits = [max_new_tokens[index] for index in chosen]
            write = answers if model.paired else _batch
            rows = write(model, [prompts[index] for index in chosen], limits, ends)
            made.update(zip(chosen, rows, strict=True))
    return [made[index] for index in range(len(prompts))]


def _batch(
    model: Trained, prompts: Sequence[Sequence[int]], limits: Sequence[int], ends: frozenset[int]
) -> list[list[int]]:
    """Padded on the left: all prompts end in the same column."""
    attached, count, width = model.attached, len(prompts), max(map(len, prompts))
    pads = [width - len(prompt) for prompt in prompts]
    ids = torch.tensor([[0] * pad + list(one) for pad, one in zip(pads, prompts, strict=True)], device=model.device)
    seen = torch.tensor([[0] * pad + [1] * (width - pad) for pad in pads], device=model.device)
    positions = (seen.cumsum(1) - 1).clamp(min=0) + attached.prefix_length
    with model.precision():
        cache = attached.prefix(count) if attached.prefix else DynamicCache(config=model.model.config)
    seen = torch.cat([seen.new_ones(count, attached.prefix_length), seen], dim=1)
    outputs: list[list[int]] = [[] for _ in prompts]
    running = [True] * count
    # As an index: a slice of one place would have torch copy the head's weights for each sequence.
    last = torch.tensor([-1], device=model.device)
    for _ in range(max(limits)):
        with model.precision():
            step: Any = model.model(
                **model.embedded(ids),
                attention_mask=seen,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=last,
            )
        ids = step.logits[:, -1].argmax(-1, keepdim=True)
        for row, token in enumerate(ids[:, 0].tolist()):
            if not running[row]:
                continue
            if token in ends:
                running[row] = False
                continue
            outputs[row].append(token)
            running[row] = len(outputs[row]) < limits[row]
        if not any(running):
            break
        seen = torch.cat([seen, seen.new_ones(count, 1)], dim=1)
        positions = positions[:, -1:] + 1
    return outputs


@contextmanager
def inference(model: Trained) -> Iterator[None]:
    """Evaluation mode, with an attention that knows padding and a cache."""
    base: PreTrainedModel = model.model
    packed, training = base.config._attn_implementation, model.training
    base.set_attn_implementation("sdpa")
    model.eval()
    try:
        yield
    finally:
        base.set_attn_implementation(packed)
        model.train(training)
