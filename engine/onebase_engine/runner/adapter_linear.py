"""Linear sites and sublayers with per-token adapters: the base's own result, and what each token's slot makes of
it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from onebase_adapters.base_shape import Site
from onebase_engine.kernels.adapter_interface import AdapterKernels
from onebase_engine.kernels.site_tables import SiteTables, add_bottlenecks
from onebase_engine.kernels.tables import BottleneckTable
from onebase_engine.runner.batching import Context


class AdapterLinear(nn.Module):
    """A linear module of the base in its place, unchanged, between its adapters' changes of input and output."""

    def __init__(self, inner: nn.Module, tables: SiteTables, context: Context, *, head: bool) -> None:
        """`head`: it is the LM head, which sees only the rows to sample from."""
        super().__init__()
        self.inner = inner
        self.tables = tables
        self.context = context
        self.head = head

    @property
    def weight(self) -> torch.Tensor:
        """The base's: T5 asks for its type."""
        return self.inner.get_parameter("weight")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        owners = self.context.owners(x.numel() // x.shape[-1], head=self.head)
        if self.head:
            self.context.head_input = x.view(-1, x.shape[-1])
        if not len(owners.tiles):
            plain: torch.Tensor = self.inner(x)
            return plain
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        if len(rows) != len(owners.slots):
            # The kernels trust the batch's description: with other rows they would write past the end.
            site = self.tables.sites[0].name
            raise RuntimeError(f"{site} was given {len(rows)} rows of a batch of {len(owners.slots)}.")
        return self.tables.apply(rows, owners, self.inner).view(*x.shape[:-1], -1)


def hook_linears(
    model: nn.Module,
    sites: Sequence[Site],
    slots: int,
    kernels: AdapterKernels,
    context: Context,
    device: torch.device,
) -> list[SiteTables]:
    """Wrap the modules of `sites` in their places."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    hooked = []
    for site in sites:
        parent, _, leaf = site.name.rpartition(".")
        inner = model.get_submodule(site.name)
        tables = SiteTables([site], slots, kernels, device)
        wrapped = AdapterLinear(inner, tables, context, head=inner is head)
        setattr(model.get_submodule(parent), leaf, wrapped)
        hooked.append(tables)
    return hooked


def hook_sublayer(module: nn.Module, table: BottleneckTable, kernels: AdapterKernels, context: Context) -> None:
    """Let the bottlenecks of `table` work on what an attention or MLP block returns."""

    def after(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        owners = context.batch.owners
        if not owners.bottleneck:
            return
        x = args[0] if args else kwargs["hidden_states"]
        y = output[0] if isinstance(output, tuple) else output
        add_bottlenecks(x.view(-1, x.shape[-1]), y.view(-1, y.shape[-1]), owners, table, kernels)

    module.register_forward_hook(after, with_kwargs=True)
