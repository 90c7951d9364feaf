"""An encoder-decoder base (T5, Raffel et al. 2020) with room for adapters: one pass of the encoder for the step's
prompts, one of the decoder for all of its sequences.

The invariant: a sequence's cache holds the keys and values of the decoder's first token and of all that follow, up
to the last that was given to `forward`.
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch
from transformers.modeling_outputs import BaseModelOutput

from onebase_adapters.primitives.instruction_set import KVPrefix
from onebase_adapters.primitives.lowered_adapter import LoweredAdapter
from onebase_engine.base.describe import cache_shape
from onebase_engine.base.load_base import LoadedBase
from onebase_engine.kernels.batch import Owners
from onebase_engine.kernels.choose import choose_kernels, replace_emulated
from onebase_engine.runner.adapter_linear import hook_linears
from onebase_engine.runner.adapter_slots import AdapterSlots
from onebase_engine.runner.batching import Chunk, Context, make_batch, make_owners
from onebase_engine.runner.lm_head import LogitScores, Scores
from onebase_engine.runner.t5_attention import DecoderCache, KeysValues, Rows, hook_t5_attention


class _Pass(Context):
    """Whose the rows are that modules are given next: prompts' in the encoder, outputs' in the decoder."""

    current: Owners

    def owners(self, rows: int, *, head: bool) -> Owners:
        return self.current


class _Prefixes:
    """Resident prefixes by slot: keys and values [layers, heads, n, width] each."""

    def __init__(self, base: LoadedBase) -> None:
        self._base = base
        self._found: dict[int, KeysValues] = {}

    def put(self, slot: int, adapter: LoweredAdapter) -> None:
        """Make an adapter's prefix the slot's, if it has one."""
        if (prefix := adapter.one(KVPrefix)) is not None:
            place = self._base.device, self._base.model.dtype
            self._found[slot] = prefix.keys.to(*place).transpose(1, 2), prefix.values.to(*place).transpose(1, 2)

    def clear(self, slot: int) -> None:
        """Forget the slot's prefix."""
        self._found.pop(slot, None)

    def tokens(self, slot: int) -> int:
        """Its length."""
        return self._found[slot][0].shape[2] if slot in self._found else 0

    def begin(self, slot: int, layers: int) -> DecoderCache:
        """A new sequence's cache, see `KVPrefix`."""
        if slot not in self._found:
            return DecoderCache()
        keys, values = self._found[slot]
        places = [2 * layer % len(keys) for layer in range(layers)]
        return DecoderCache({layer: (keys[place], values[place]) for layer, place in enumerate(places)})


class EncoderDecoder(AdapterSlots):
    """A loaded encoder-decoder, hooked. Not thread-safe: one step at a time."""

    def __init__(self, base: LoadedBase, *, slots: int) -> None:
        """`slots`: most adapters resident at once."""
        super().__init__(base, slots)
        replace_emulated(base.model)
        self._model: Any = base.model
        self._kernels = choose_kernels(
            base.device, base.model.dtype, cache_shape(base.model.config).dim,
            [site.in_features for site in base.shape.sites.values()],
        )  # fmt: skip
        self._context, self._rows = _Pass(), Rows()
        sites = list(base.shape.sites.values())
        self._sites = hook_linears(base.model, sites, slots + 1, self._kernels, self._context, base.device)
        self._crossing = hook_t5_attention(base.model, self._rows)
        self._caches: dict[str, DecoderCache] = {}
        self._prefixes = _Prefixes(base)
        self._tables.append(self._prefixes)

    def warm_up(self, *, all_kinds: bool = True) -> None:
        """Let everything that happens at a first use happen now."""
        self.forward([Chunk([0], 0, [0], prompt=1)])
        self.release("")

    def release(self, sequence: str) -> None:
        """Forget a sequence that has ended, or that is to be computed anew."""
        self._caches.pop(sequence, None)

    @torch.inference_mode()
    def forward(self, chunks: Sequence[Chunk]) -> Scores:
        """Advance each sequence by its chunk (a whole prompt with what follows it, or what comes next), and return
        the wanted scores."""
        if new := [chunk for chunk in chunks if chunk.start == 0]:
            self._caches |= self._read(new)
        tokens = [self._decoded(chunk) for chunk in chunks]
        caches = [self._caches[chunk.sequence] for chunk in chunks]
        for chunk, cache in zip(chunks, caches, strict=True):
            # More than that is there if a step failed half-way, and is now due again.
            written = 0 if chunk.start == 0 else 1 + chunk.start - chunk.prompt
            cache.crop(self._prefixes.tokens(chunk.slot) + written)
        self._enter([(chunk.slot, len(its)) for chunk, its in zip(chunks, tokens, strict=True)], caches)
        flat = torch.tensor([[token for its in tokens for token in its]], device=self.base.device)
        unread = BaseModelOutput(flat.new_empty(1, 1, self.shape.hidden, dtype=self._model.dtype))
        logits = self._model(encoder_outputs=unread, decoder_input_ids=flat, use_cache=False).logits[0]
        wanted = [
            row
            for chunk, span in zip(chunks, self._rows.spans, strict=True)
            for row in range(span.stop - chunk.wanted, span.stop)
        ]
        return LogitScores(logits[wanted], torch.empty(len(wanted), 0))

    def _decoded(self, chunk: Chunk) -> Sequence[int]:
        """The decoder's part of a chunk."""
        return chunk.tokens if chunk.start else [self.shape.decoder_start, *chunk.tokens[chunk.prompt :]]

    def _read(self, chunks: Sequence[Chunk]) -> dict[str, DecoderCache]:
        """Let the encoder read the prompts, and each layer of the decoder what has come of it."""
        prompts = [
            Chunk(chunk.tokens[self._prefixes.tokens(chunk.slot) : chunk.prompt], 0, chunk.blocks, chunk.slot)
            for chunk in chunks
        ]
        batch = make_batch(
            prompts, self._kernels, self._traits, self.base.device, vocab=self.shape.vocab, kv_heads=1
        )  # fmt: skip
        self._enter([(prompt.slot, len(prompt.tokens)) for prompt in prompts], ())
        read = self._model.encoder(inputs_embeds=self._inputs(batch)[None]).last_hidden_state
        caches = [self._prefixes.begin(prompt.slot, len(self._crossing)) for prompt in prompts]
        for layer, attention in enumerate(self._crossing):
            k, v = attention.keys_values(read)
            for cache, span in zip(caches, self._rows.spans, strict=True):
                cache.prompt[layer] = k[:, span].contiguous(), v[:, span].contiguous()
        return {chunk.sequence: cache for chunk, cache in zip(chunks, caches, strict=True)}

    def _enter(self, counts: Sequence[tuple[int, int]], caches: Sequence[DecoderCache]) -> None:
        """The modules' next rows are so many of each slot."""
        slots = np.repeat(*np.array(counts, np.int32).T)
        self._context.current = make_owners(slots, self._kernels, self._traits)
        ends = accumulate((count for _, count in counts), initial=0)
        self._rows.spans = [slice(start, end) for start, end in pairwise(ends)]
        self._rows.caches = caches
