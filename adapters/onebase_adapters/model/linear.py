"""Linear sites with per-token adapters: the base's product first, then what each token's slot adds to it."""

import torch
from torch import nn

from onebase_adapters.batch import Context
from onebase_adapters.kernels import Kernels
from onebase_adapters.kernels.table import LowRankTable


class AdapterLinear(nn.Module):
    """A linear module of the base in its place, unchanged, followed by its table's updates."""

    def __init__(
        self, inner: nn.Module, table: LowRankTable, kernels: Kernels, context: Context, *, head: bool
    ) -> None:
        """`head`: it is the LM head, which sees only the rows to sample from."""
        super().__init__()
        self.inner = inner
        self.table = table
        self.kernels = kernels
        self.context = context
        self.head = head

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.inner(x)
        batch = self.context.batch
        owners = batch.head_owners if self.head else batch.owners
        if len(owners.tiles):
            rows = x.reshape(-1, x.shape[-1]).contiguous()
            self.kernels.add_low_rank(rows, y.view(-1, y.shape[-1]), owners, self.table)
        return y
