"""The base model with room for adapters: one forward pass for a flat batch of any mix of them."""

import logging
from collections.abc import Sequence

import torch

from onebase_adapters.base_shape import BaseShape
from onebase_adapters.primitives.instruction_set import Bottleneck, LowRank, Primitive, Shift
from onebase_adapters.primitives.lowered_adapter import LoweredAdapter
from onebase_engine.base.base_spec import BaseSpec
from onebase_engine.base.describe import cache_shape
from onebase_engine.base.load_base import LoadedBase, load_base
from onebase_engine.base.package_files import Progress
from onebase_engine.cache.kv_pages import PagedKV
from onebase_engine.kernels.adapter_interface import AdapterKernels
from onebase_engine.kernels.batch import Batch
from onebase_engine.kernels.choose import choose_kernels, replace_emulated
from onebase_engine.kernels.interface import Fused, HeadScreen
from onebase_engine.kernels.linear4bit import nf4_copy
from onebase_engine.kernels.tables import BottleneckTable
from onebase_engine.runner.adapter_linear import hook_linears, hook_sublayer
from onebase_engine.runner.adapter_slots import AdapterSlots
from onebase_engine.runner.batching import Chunk, Context, make_batch
from onebase_engine.runner.learned_prefix import PrefixTable
from onebase_engine.runner.lm_head import HeadKind, HiddenScores, LogitScores, Scores
from onebase_engine.runner.paged_attention import ATTENTION_NAME, hook_attention, register_attention
from onebase_engine.runner.routed_experts import hook_experts, routers_of
from onebase_engine.runner.step_replay import Capture, Replays

log = logging.getLogger(__name__)


class ServedModel(AdapterSlots):
    """A loaded base, hooked. Not thread-safe: one step at a time."""

    def __init__(self, base: LoadedBase, *, slots: int, blocks: int, head: HeadKind = "screened") -> None:
        """`slots`: most adapters resident at once; `blocks`: size of the cache; `head`: see `HeadKind`."""
        super().__init__(base, slots)
        replace_emulated(base.model, always=routers_of(base.model))
        self._model = base.model
        self._device = base.device
        self._context = Context()
        self._kernels = choose_kernels(
            base.device, torch.bfloat16, cache_shape(base.model.config).dim,
            [site.in_features for site in base.shape.sites.values()],
        )  # fmt: skip
        replays = self._kernels.CAPTURED and base.device.type == "cuda" and Replays.suit(base.model)
        # A captured step's rows that are nobody's write into one block more.
        self.cache = PagedKV(base.model.config, blocks + replays, self._kernels, base.device)
        hook_attention(base.model, self.cache, self._context)
        if head == "nf4" and not base.shape.encoder:
            base.model.set_output_embeddings(nf4_copy(base.model.get_output_embeddings()))
        self._bare_head = base.model.get_output_embeddings()
        self._screen = self._make_screen() if head == "screened" else None
        self._fused: Fused | None = None
        if (made := self._kernels.fuse(base.model, base.shape, self.cache, slots + 1)) is not None:
            self._fused, self._sites, self._sublayers = made
        self._sites += hook_experts(base.model, base.shape, slots + 1, self._kernels, self._context, base.device)
        covered = {site.name for tables in self._sites for site in tables.sites}
        rest = [site for site in base.shape.sites.values() if site.name not in covered]
        self._sites += hook_linears(base.model, rest, slots + 1, self._kernels, self._context, base.device)
        if self._fused is None:
            self._sublayers = _hook_sublayers(base, slots + 1, self._kernels, self._context)
        self._head_tables = next((tables for tables in self._sites if tables.sites[0].name == "lm_head"), None)
        self._prefixes = PrefixTable(self.cache)
        self._tables.append(self._prefixes)
        self._replays: Replays | None = None
        if replays and not base.shape.encoder:
            self.replay_decodes(spare_block=blocks)

    @classmethod
    def load(cls, spec: BaseSpec, *, slots: int, blocks: int, progress: Progress = log.info) -> "ServedModel":
        """Load `spec` and hook it. Raises BaseModelError."""
        register_attention()
        return cls(load_base(spec, attention=ATTENTION_NAME, progress=progress), slots=slots, blocks=blocks)

    def replay_decodes(self, *, spare_block: int, capture: Capture | None = None) -> None:
        """Capture decoding steps from here on; see `Replays`."""
        tables = [tables.low_rank for tables in self._sites]
        self._replays = Replays(
            self._run, tables, self._kernels, self._device, spare_block=spare_block, capture=capture
        )

    def _make_screen(self) -> HeadScreen | None:
        if self._bare_head is None:
            return None
        if (screen := self._kernels.screen(self._bare_head)) is None:
            log.info("greedy tokens come from all logits: the head cannot be screened here")
        return screen

    def release(self, sequence: str) -> None:
        """Forget a sequence: nothing is kept of any, its pages are the engine's."""

    def warm_up(self, *, all_kinds: bool = True) -> None:
        """Compile (or read from the cache) every kernel that serving needs, on pages that nobody uses yet; without
        `all_kinds` of adapters, what the base alone needs."""
        if not all_kinds:
            self.forward([Chunk([0] * 8, 0, [0])])
            return
        slot = self.put(_of_every_kind(self.shape))
        for chunk in (Chunk([0], 0, [0]), Chunk([0], 0, [0], slot=slot), Chunk([0] * 8, 0, [0], slot=slot)):
            self.forward([chunk])
        self.remove(slot)

    @torch.inference_mode()
    def forward(self, chunks: Sequence[Chunk]) -> Scores:
        """Run the chunks as one batch, write their keys and values, and return the wanted rows' scores, in the
        order of the chunks."""
        chunks = self._prefixes.write(chunks)
        if not chunks:
            return LogitScores(torch.empty(0, 0), torch.empty(0, 0))
        if (scores := self._replayed(chunks)) is not None:
            return scores
        batch = self._context.batch = make_batch(
            chunks, self._kernels, self._traits, self._device, vocab=self.shape.vocab,
            kv_heads=self.cache.kv_heads, encoder=self.shape.encoder,
        )  # fmt: skip
        if self._fused is not None:
            hidden = self._inputs(batch)
            changed = self._head_tables is not None and self._head_tables.touch(batch.head_owners.slots)
            last = self._fused(batch, hidden)
            if changed:
                return HiddenScores(last, self._model.lm_head, None, together=True)
            return HiddenScores(last, self._bare_head, self._screen)
        if self.shape.encoder:
            hidden, positions = self._inputs(batch), self._positions(batch)
            out = self._model(inputs_embeds=hidden[None], position_ids=positions).last_hidden_state[0]
            return LogitScores(torch.empty(0, 0), out[batch.sample_rows])
        return LogitScores(*self._run(batch))

    def _replayed(self, chunks: Sequence[Chunk]) -> Scores | None:
        """The step's scores, if it is captured or can be."""
        if self._replays is None or self._inputs.touches({chunk.slot for chunk in chunks}):
            return None
        if not self._replays.fit(chunks, self._traits, self.shape.vocab):
            return None
        found = self._replays(chunks, self._changes)
        return None if found is None else LogitScores(*(part.clone() for part in found))

    def _run(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """The decoder's logits and last hidden states for the batch's sample rows."""
        self._context.batch = batch
        if self._fused is not None:
            last = self._fused(batch, self._inputs(batch))
            return self._model.lm_head(last), last
        logits: torch.Tensor = self._model(
            inputs_embeds=self._inputs(batch)[None],
            position_ids=self._positions(batch),
            use_cache=False,
            logits_to_keep=batch.sample_rows,
        ).logits[0]
        return logits, self._context.head_input

    def _positions(self, batch: Batch) -> torch.Tensor:
        """[1, T] places in the model's table of positions."""
        if batch.held is not None:
            return (batch.held.positions + self.shape.first_position)[None]
        return torch.as_tensor(batch.positions + self.shape.first_position, device=self._device)[None]


def _hook_sublayers(
    base: LoadedBase, slots: int, kernels: AdapterKernels, context: Context
) -> list[BottleneckTable]:
    """Let each sublayer's output pass its bottlenecks."""
    tables = [
        BottleneckTable(name, slots, base.device, transposed=kernels.TRANSPOSED_DOWN)
        for name in sorted(base.shape.sublayers)
    ]
    for table in tables:
        hook_sublayer(base.model.get_submodule(table.name), table, kernels, context)
    return tables


def _of_every_kind(shape: BaseShape) -> LoweredAdapter:
    """An adapter with a primitive for each kernel, everywhere, that changes nothing."""
    primitives: list[Primitive] = []
    for site in shape.sites.values():
        a, b = torch.zeros(1, site.in_features), torch.zeros(site.out_features, 1)
        primitives += [LowRank(site.name, a, b, 1.0), Shift(site.name, b[:, 0])]
    for name in shape.sublayers:
        down, up = torch.zeros(1, shape.hidden), torch.zeros(shape.hidden, 1)
        primitives.append(Bottleneck(name, down, down[:, 0], up, up[:, 0], "relu", 1.0, parallel=False))
    return LoweredAdapter("", "", tuple(primitives))
