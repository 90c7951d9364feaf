"""An encoder-decoder base (T5, Raffel et al. 2020) with room for adapters, one sequence after another.

Attention and its cache are transformers' own. The invariant: a sequence's state holds the keys and values of the
decoder's first token and of all generated ones up to the last that was given to `forward`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from onebase_engine.base.describe import cache_shape
from onebase_engine.base.load_base import LoadedBase
from onebase_engine.kernels.adapter_interface import AdapterKernels
from onebase_engine.kernels.batch import Owners, Traits
from onebase_engine.kernels.choose import choose_kernels, replace_emulated
from onebase_engine.runner.adapter_linear import hook_linears
from onebase_engine.runner.adapter_slots import AdapterSlots
from onebase_engine.runner.batching import Chunk, Context, make_batch, make_owners
from onebase_engine.runner.lm_head import LogitScores, Scores


class _OneSlot(Context):
    """All rows of every module are one adapter's: those of the prompt, of the output, and of the prompt again where
    the decoder attends to it."""

    def __init__(self, kernels: AdapterKernels, traits: Traits) -> None:
        self._kernels = kernels
        self._traits = traits
        self._slot = 0
        self._made: dict[int, Owners] = {}

    def enter(self, slot: int) -> None:
        """Take the modules' next inputs as this slot's."""
        self._slot, self._made = slot, {}

    def owners(self, rows: int, *, head: bool) -> Owners:
        if rows not in self._made:
            self._made[rows] = make_owners(np.full(rows, self._slot, np.int32), self._kernels, self._traits)
        return self._made[rows]


@dataclass(frozen=True)
class _State:
    """The state of a running sequence."""

    read: BaseModelOutput
    """What the encoder made of the prompt, [1, prompt, hidden]."""
    cache: EncoderDecoderCache


class EncoderDecoder(AdapterSlots):
    """A loaded encoder-decoder, hooked. Not thread-safe: one step at a time."""

    def __init__(self, base: LoadedBase, *, slots: int) -> None:
        """`slots`: most adapters resident at once."""
        super().__init__(base, slots)
        replace_emulated(base.model)
        self._model = base.model
        self._kernels = choose_kernels(
            base.device, base.model.dtype, cache_shape(base.model.config).dim,
            [site.in_features for site in base.shape.sites.values()],
        )  # fmt: skip
        self._context = _OneSlot(self._kernels, self._traits)
        sites = list(base.shape.sites.values())
        self._sites = hook_linears(base.model, sites, slots + 1, self._kernels, self._context, base.device)
        self._states: dict[str, _State] = {}

    def warm_up(self, *, all_kinds: bool = True) -> None:
        """Let everything that happens at a first use happen now."""
        self.forward([Chunk([0], 0, [0], prompt=1)])
        self.release("")

    def release(self, sequence: str) -> None:
        """Forget a sequence that has ended, or that is to be computed anew."""
        self._states.pop(sequence, None)

    @torch.inference_mode()
    def forward(self, chunks: Sequence[Chunk]) -> Scores:
        """Advance each sequence by its chunk (a whole prompt with what has been generated, or what comes next), and
        return the scores after each of them."""
        logits = torch.cat([self._advance(chunk) for chunk in chunks])
        return LogitScores(logits, torch.empty(len(logits), 0))

    def _advance(self, chunk: Chunk) -> torch.Tensor:
        """[1, vocab]."""
        self._context.enter(chunk.slot)
        if chunk.start == 0:
            state = _State(self._read(chunk), EncoderDecoderCache(DynamicCache(), DynamicCache()))
            tokens = [self.shape.decoder_start, *chunk.tokens[chunk.prompt :]]
        else:
            state, tokens = self._states[chunk.sequence], list(chunk.tokens)
            for layer in state.cache.self_attention_cache.layers:
                # More than that is there if a step failed half-way, and is now due again.
                layer.crop(1 + chunk.start - chunk.prompt - layer.get_seq_length())
        logits: torch.Tensor = self._model(
            encoder_outputs=state.read,
            decoder_input_ids=torch.tensor([tokens], device=self.base.device),
            past_key_values=state.cache,
            use_cache=True,
        ).logits
        self._states[chunk.sequence] = state
        return logits[0, -1:]

    def _read(self, chunk: Chunk) -> BaseModelOutput:
        prompt = Chunk(chunk.tokens[: chunk.prompt], 0, chunk.blocks, chunk.slot)
        batch = make_batch(
            [prompt], self._kernels, self._traits, self.base.device, vocab=self.shape.vocab, kv_heads=1
        )  # fmt: skip
        made: BaseModelOutput = self._model.get_encoder()(inputs_embeds=self._inputs(batch)[None])
        return made
