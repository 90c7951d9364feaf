"""The base model with room for adapters: one forward pass for a flat batch of any mix of them."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from onebase_adapters.base.load import LoadedBase, load_base
from onebase_adapters.base.shape import BaseShape, Site, cache_shape
from onebase_adapters.base.spec import BaseSpec
from onebase_adapters.batch import Batch, Context, Owners
from onebase_adapters.kernels import Kernels, choose_kernels
from onebase_adapters.kernels.block import BLOCK
from onebase_adapters.kernels.table import Arena, LowRankTable
from onebase_adapters.kernels.tiles import low_rank_tiles
from onebase_adapters.model.fused import FusedModel, fuse
from onebase_adapters.model.head import HeadKind, HiddenScores, LogitScores, Scores, Screen, nf4_copy
from onebase_adapters.model.linear import AdapterLinear
from onebase_adapters.model.paged import ATTENTION_NAME, PagedKV, hook_attention, register_attention
from onebase_adapters.model.weights import ModelWeights
from onebase_adapters.packages import Progress
from onebase_adapters.primitives import LoweredAdapter, LowRank

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Chunk:
    """Consecutive tokens of one sequence, for one forward pass."""

    tokens: Sequence[int]
    start: int
    """Position of the first."""
    blocks: Sequence[int]
    """The sequence's cache blocks from its position 0 on, enough for the last of `tokens`."""
    slot: int = 0
    """The resident adapter; 0 is none."""
    sample: bool = True
    """Whether the logits after the last token are wanted."""
    all_logits: bool = False
    """Whether the logits after every token are wanted."""


class ServedModel:
    """A loaded base, hooked. Not thread-safe: one step at a time."""

    def __init__(self, base: LoadedBase, *, slots: int, blocks: int, head: HeadKind = "screened") -> None:
        """`slots`: most adapters resident at once; `blocks`: size of the cache; `head`: see `HeadKind`."""
        self.base = base
        self.shape: BaseShape = base.shape
        self._model = base.model
        self._device = base.device
        self._context = Context()
        self.weights = ModelWeights(base.model)
        self._kernels = choose_kernels(
            base.device, torch.bfloat16, cache_shape(base.model.config).dim,
            [site.in_features for site in base.shape.sites.values()],
        )  # fmt: skip
        self.cache = PagedKV(base.model.config, blocks, self._kernels, base.device)
        hook_attention(base.model, self.cache, self._context)
        if head == "nf4":
            base.model.set_output_embeddings(nf4_copy(base.model.get_output_embeddings()))
        self._screen = self._make_screen() if head == "screened" else None
        self._tables: list[LowRankTable] = []
        self._fused: FusedModel | None = None
        if (made := fuse(base.model, base.shape, self._kernels, self.cache, slots + 1)) is not None:
            self._fused, self._tables = made
        covered = {site.name for table in self._tables for site in table.sites}
        rest = [site for site in base.shape.sites.values() if site.name not in covered]
        self._tables += _hook_linears(base.model, rest, slots + 1, self._kernels, self._context)
        self._head_table = next((table for table in self._tables if table.sites[0].name == "lm_head"), None)
        self._free_slots = list(range(slots, 0, -1))
        self._arenas: dict[int, Arena] = {}

    @classmethod
    def load(cls, spec: BaseSpec, *, slots: int, blocks: int, progress: Progress = log.info) -> "ServedModel":
        """Load `spec` and hook it. Raises BaseModelError."""
        register_attention()
        return cls(load_base(spec, attention=ATTENTION_NAME, progress=progress), slots=slots, blocks=blocks)

    def _make_screen(self) -> Screen | None:
        head = self._model.get_output_embeddings()
        if self._device.type == "cpu" and Screen.fits(head):
            return Screen(head)
        log.info("greedy tokens come from all logits: the head cannot be screened here")
        return None

    @property
    def free_slots(self) -> int:
        return len(self._free_slots)

    def put(self, adapter: LoweredAdapter) -> int:
        """Make an adapter resident and return its slot. Raises IndexError when no slot is free."""
        slot = self._free_slots.pop()
        updates = {p.site: p for p in adapter.primitives if isinstance(p, LowRank)}
        arena = self._arenas[slot] = Arena(sum(table.size(updates) for table in self._tables), self._device)
        for table in self._tables:
            table.put(slot, updates, arena)
        return slot

    def remove(self, slot: int) -> None:
        """Free a slot that no running sequence uses."""
        for table in self._tables:
            table.clear(slot)
        del self._arenas[slot]
        self._free_slots.append(slot)

    def slot_bytes(self, slot: int) -> int:
        """Memory of a resident adapter."""
        return self._arenas[slot].bytes

    def warm_up(self) -> None:
        """Compile (or read from the cache) every kernel that serving needs, on pages that nobody uses yet."""
        for length in (1, 8):
            self.forward([Chunk([0] * length, 0, [0], slot=self._free_slots[-1])])

    @torch.inference_mode()
    def forward(self, chunks: Sequence[Chunk]) -> Scores:
        """Run the chunks as one batch, write their keys and values, and return the wanted rows' scores, in the
        order of the chunks."""
        batch = self.batch(chunks)
        self._context.batch = batch
        if self._fused is not None:
            changed = self._head_table is not None and self._head_table.touches(batch.head_owners.slots)
            return HiddenScores(self._fused(batch), self._model.lm_head, None if changed else self._screen)
        logits: torch.Tensor = self._model(
            input_ids=batch.token_ids[None],
            position_ids=torch.as_tensor(batch.positions, device=self._device)[None],
            use_cache=False,
            logits_to_keep=batch.sample_rows,
        ).logits[0]
        return LogitScores(logits)

    def batch(self, chunks: Sequence[Chunk]) -> Batch:
        """Lay the chunks out as flat arrays."""
        lengths = [len(chunk.tokens) for chunk in chunks]
        query_start = np.zeros(len(chunks) + 1, np.int64)
        np.cumsum(lengths, out=query_start[1:])
        total = int(query_start[-1])
        token_ids = np.fromiter((token for chunk in chunks for token in chunk.tokens), np.int64, total)
        tables = np.zeros((len(chunks), max(len(chunk.blocks) for chunk in chunks)), np.int32)
        for row, chunk in enumerate(chunks):
            tables[row, : len(chunk.blocks)] = chunk.blocks
        counts = np.asarray(lengths)
        within = np.arange(total) - np.repeat(query_start[:-1], counts)
        positions = within + np.repeat([chunk.start for chunk in chunks], counts)
        rows = np.repeat(np.arange(len(chunks)), counts)
        slots = np.repeat(np.array([chunk.slot for chunk in chunks], np.int32), counts)
        wanted: list[int] = []
        for row, chunk in enumerate(chunks):
            if chunk.all_logits:
                wanted.extend(range(int(query_start[row]), int(query_start[row + 1])))
            elif chunk.sample:
                wanted.append(int(query_start[row + 1]) - 1)
        return Batch(
            token_ids=torch.from_numpy(token_ids).to(self._device),
            positions=positions,
            owners=self._owners(slots),
            head_owners=self._owners(slots[wanted]),
            query_start=query_start,
            tables=tables,
            cache_slots=tables[rows, positions // BLOCK].astype(np.int64) * BLOCK + positions % BLOCK,
            sample_rows=torch.tensor(wanted, dtype=torch.int64, device=self._device),
            items=self._kernels.attention_items(query_start, positions, self.cache.kv_heads),
        )

    def _owners(self, slots: np.ndarray) -> Owners:
        return Owners(slots, low_rank_tiles(slots, self._kernels.TILE_ROWS))


def _hook_linears(
    model: nn.Module, sites: Sequence[Site], slots: int, kernels: Kernels, context: Context
) -> list[LowRankTable]:
    """Wrap the modules of `sites` in their places."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    tables = []
    for site in sites:
        parent, _, leaf = site.name.rpartition(".")
        inner = model.get_submodule(site.name)
        table = LowRankTable([site], slots, transposed_a=kernels.TRANSPOSED_A)
        wrapped = AdapterLinear(inner, table, kernels, context, head=inner is head)
        setattr(model.get_submodule(parent), leaf, wrapped)
        tables.append(table)
    return tables
