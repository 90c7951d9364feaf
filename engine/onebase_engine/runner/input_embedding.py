"""From token ids to the residual stream: the base's embedding, its adapters' updates of it, and virtual tokens."""

from typing import Any

import numpy as np
import torch

from onebase_adapters.primitives.instruction_set import LowRank, VirtualTokens
from onebase_adapters.primitives.lowered_adapter import LoweredAdapter
from onebase_engine.kernels.batch import Batch


class InputEmbedding:
    """The base's input embedding with what resident adapters have beside it, by slot."""

    def __init__(self, module: Any, name: str, device: torch.device) -> None:
        """`name`: the embedding's module path, by which updates name it."""
        self._module = module
        self._name = name
        self._device = device
        self._virtual: dict[int, tuple[int, torch.Tensor]] = {}
        """Index of the first of them among the adapter's virtual ids, and [n, hidden]."""
        self._updates: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        """A transposed [vocab, rank], and scale * B transposed [rank, hidden]."""

    def put(self, slot: int, adapter: LoweredAdapter) -> None:
        """Make an adapter's embeddings the slot's."""
        dtype = self._module.weight.dtype
        if (virtual := adapter.one(VirtualTokens)) is not None:
            self._virtual[slot] = (adapter.layout.prefix, virtual.embeddings.to(self._device, dtype))
        for update in adapter.of(LowRank):
            if update.site == self._name:
                a, b = update.a.t().contiguous(), update.b.t() * update.scale
                self._updates[slot] = (a.to(self._device, dtype), b.to(self._device, dtype))

    def clear(self, slot: int) -> None:
        """Forget the slot's embeddings."""
        self._virtual.pop(slot, None)
        self._updates.pop(slot, None)

    def touches(self, slots: set[int]) -> bool:
        """Whether any of these slots has an adapter that changes the embeddings of tokens."""
        return not self._updates.keys().isdisjoint(slots)

    def __call__(self, batch: Batch) -> torch.Tensor:
        """[T, hidden]."""
        hidden: torch.Tensor = self._module(batch.token_ids)
        for slot, (a, b) in self._updates.items():
            rows = torch.as_tensor(np.flatnonzero(batch.owners.slots == slot), device=self._device)
            if len(rows):
                change = a[batch.token_ids[rows]].float() @ b.float()
                hidden[rows] = (hidden[rows].float() + self._scaled(change)).to(hidden.dtype)
        if len(batch.virtual_rows):
            owners = batch.owners.slots[batch.virtual_rows]
            for slot in set(owners.tolist()):
                rows = batch.virtual_rows[owners == slot]
                first, embeddings = self._virtual[slot]
                indices = batch.virtual_indices[owners == slot] - first
                hidden[torch.as_tensor(rows, device=self._device)] = embeddings[
                    torch.as_tensor(indices, device=self._device)
                ]
        return hidden

    def _scaled(self, change: torch.Tensor) -> torch.Tensor:
        # Gemma multiplies its embeddings in the module itself; PEFT multiplies the update, too.
        scale = getattr(self._module, "embed_scale", None)
        return change if scale is None else change * scale
