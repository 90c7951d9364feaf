"""Resident classification heads by slot: last hidden states to probabilities."""

import torch

from onebase_adapters.primitives.instruction_set import Head
from onebase_adapters.primitives.lowered_adapter import LoweredAdapter


class HeadTable:
    """In float32: a head is small, and its labels may be close."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._heads: dict[int, Head] = {}

    def put(self, slot: int, adapter: LoweredAdapter) -> None:
        """Make an adapter's head the slot's, if it has one."""
        if (head := adapter.one(Head)) is not None:
            weight, bias = head.weight.float().to(self._device), head.bias.float().to(self._device)
            self._heads[slot] = Head(head.kind, head.pooling, weight, bias, head.labels)

    def clear(self, slot: int) -> None:
        """Forget the slot's head."""
        self._heads.pop(slot, None)

    def get(self, slot: int) -> Head | None:
        """The slot's head."""
        return self._heads.get(slot)


def pool(hidden: torch.Tensor, pooling: str) -> torch.Tensor:
    """One vector [width] of a sequence's hidden states [n, width], float32."""
    if pooling == "mean":
        return hidden.float().mean(0)
    return hidden[0 if pooling == "first" else -1].float()


def probabilities(head: Head, hidden: torch.Tensor) -> list[list[float]]:
    """Each label's probability: one row for a sequence head, a row for each of the hidden states [n, width] for a
    token head."""
    rows = hidden.float() if head.kind == "token" else pool(hidden, head.pooling)[None]
    found: list[list[float]] = torch.nn.functional.linear(rows, head.weight, head.bias).softmax(-1).tolist()
    return found
