"""T5's attention over the flat rows of many sequences, each of which sees only its own (Raffel et al. 2020, section
2.1: no scale, and a learned bias for each distance in place of positions).

A sequence's rows are computed by themselves, so their bits do not depend on its company.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

KeysValues = tuple[torch.Tensor, torch.Tensor]
"""[heads, tokens, head width] each."""


@dataclass
class DecoderCache:
    """A sequence's keys and values, by the decoder's layers."""

    own: dict[int, KeysValues] = field(default_factory=dict)
    """Of the decoder's tokens, behind a learned prefix's."""
    prompt: dict[int, KeysValues] = field(default_factory=dict)
    """Of what the encoder made of the prompt."""

    def crop(self, tokens: int) -> None:
        """Keep only those of the first tokens."""
        self.own = {layer: (k[:, :tokens], v[:, :tokens]) for layer, (k, v) in self.own.items()}

    def extend(self, layer: int, new: KeysValues) -> KeysValues:
        """Add a layer's new ones; returns all of that layer."""
        if (old := self.own.get(layer)) is not None:
            new = torch.cat([old[0], new[0]], 1), torch.cat([old[1], new[1]], 1)
        self.own[layer] = new
        return new


class Rows:
    """The sequences whose flat rows the attention modules of one model are given next."""

    def __init__(self) -> None:
        self.spans: Sequence[slice] = ()
        """Each sequence's rows."""
        self.caches: Sequence[DecoderCache] = ()
        """Each sequence's, in the decoder."""


class _Attention(nn.Module):
    """Stands for one of transformers' T5Attention, whose modules it uses."""

    def __init__(self, inner: Any, rows: Rows, *, cross: bool) -> None:
        super().__init__()
        self.inner = inner
        self._rows = rows
        self._cross = cross

    def keys_values(self, x: torch.Tensor) -> KeysValues:
        """The keys and values of rows [1, T, hidden]."""
        return self._heads(self.inner.k(x)), self._heads(self.inner.v(x))

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x[0].view(len(x[0]), self.inner.n_heads, -1).transpose(0, 1)

    def forward(
        self, hidden: torch.Tensor, position_bias: Sequence[torch.Tensor] | None = None, **_ignored: Any
    ) -> tuple[torch.Tensor, Sequence[torch.Tensor] | None, None]:
        """[1, T, hidden]; and one bias for each sequence, [heads, rows, keys], which later layers share."""
        query = self._heads(self.inner.q(hidden))
        spans, seen = self._rows.spans, self._seen(hidden)
        if position_bias is None and not self._cross:
            position_bias = [
                self._bias(span.stop - span.start, k.shape[1]) for span, (k, _) in zip(spans, seen, strict=True)
            ]
        biases: Sequence[torch.Tensor | None] = position_bias or [None] * len(spans)
        parts = [
            scaled_dot_product_attention(query[:, span], k, v, attn_mask=bias, scale=1.0)
            for span, (k, v), bias in zip(spans, seen, biases, strict=True)
        ]
        out = torch.cat(parts, 1).transpose(0, 1).flatten(1)
        return self.inner.o(out[None]), position_bias, None

    def _seen(self, hidden: torch.Tensor) -> list[KeysValues]:
        """What each sequence attends to."""
        if self._cross:
            return [cache.prompt[self.inner.layer_idx] for cache in self._rows.caches]
        k, v = self.keys_values(hidden)
        new = [(k[:, span], v[:, span]) for span in self._rows.spans]
        if not self.inner.is_decoder:
            return new
        return [
            cache.extend(self.inner.layer_idx, part) for cache, part in zip(self._rows.caches, new, strict=True)
        ]

    def _bias(self, rows: int, keys: int) -> torch.Tensor:
        """[heads, rows, keys] for the last rows; in the decoder what comes later is hidden."""
        bias: torch.Tensor = self.inner.compute_bias(rows, keys, past_seen_tokens=keys - rows)[0]
        if self.inner.is_decoder and rows > 1:
            hidden = torch.ones(rows, keys, dtype=torch.bool, device=bias.device).triu(keys - rows + 1)
            bias = bias.masked_fill(hidden, float("-inf"))
        return bias


def hook_t5_attention(model: Any, rows: Rows) -> list[_Attention]:
    """Put ours in the place of T5's, whose linear modules are hooked already; returns those that read the prompt,
    by the decoder's layers."""
    crossing = []
    for block in [*model.encoder.block, *model.decoder.block]:
        part = block.layer[0]
        part.SelfAttention = _Attention(part.SelfAttention, rows, cross=False)
    for block in model.decoder.block:
        part = block.layer[1]
        part.EncDecAttention = _Attention(part.EncDecAttention, rows, cross=True)
        crossing.append(part.EncDecAttention)
    return crossing
