"""Linear sites and sublayers with per-token adapters: the base's own result, and what each token's slot makes of
it."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from onebase_adapters.base.shape import Site
from onebase_adapters.batch import Context, Owners
from onebase_adapters.kernels.affine_table import AffineTable
from onebase_adapters.kernels.bottleneck_table import BottleneckTable
from onebase_adapters.kernels.contract import Kernels
from onebase_adapters.kernels.table import Arena, LowRankTable
from onebase_adapters.parts import Parts

Linear = Callable[[torch.Tensor], torch.Tensor]


class SiteTables:
    """All that resident adapters have at a group of sites that read the same input."""

    def __init__(self, sites: Sequence[Site], slots: int, kernels: Kernels, device: torch.device) -> None:
        self.sites = tuple(sites)
        self.low_rank = LowRankTable(sites, slots, paired_columns=kernels.PAIRED_COLUMNS)
        self.affine = AffineTable(sites, slots, device)
        self._kernels = kernels

    def size(self, parts: Parts) -> int:
        """Elements that `put` takes from an arena."""
        return self.low_rank.size(parts.low_rank)

    def put(self, slot: int, parts: Parts, arena: Arena) -> None:
        """Make what an adapter has for these sites the slot's."""
        self.low_rank.put(slot, parts.low_rank, arena)
        self.affine.put(slot, parts)

    def clear(self, slot: int) -> None:
        """Forget what the slot has."""
        self.low_rank.clear(slot)
        self.affine.clear(slot)

    def touch(self, slots: np.ndarray) -> bool:
        """Whether any of these slots has an adapter that changes these sites."""
        return self.low_rank.touches(slots) or self.affine.touch(slots)

    def change_input(self, x: torch.Tensor, owners: Owners) -> torch.Tensor:
        """For a single site: x [rows, in], or a copy that is rescaled."""
        inputs = self.affine.inputs[0]
        if not inputs.touch(owners.slots):
            return x
        changed = x.clone()
        self._kernels.affine_rows(changed, owners, inputs, self.affine.none)
        return changed

    def recompute(self, x: torch.Tensor, y: torch.Tensor, owners: Owners, linears: Sequence[Linear]) -> None:
        """For several sites on one input: y [rows, sum of out] anew where one site's input is to be rescaled."""
        for number, (inputs, linear) in enumerate(zip(self.affine.inputs, linears, strict=True)):
            first, last = self.affine.columns[number : number + 2]
            for slot, vector in inputs.by_slot.items():
                rows = torch.as_tensor(np.flatnonzero(owners.slots == slot), device=x.device)
                if len(rows):
                    y[rows, first:last] = linear((x[rows].float() * vector).to(x.dtype))

    def change_output(self, y: torch.Tensor, owners: Owners) -> None:
        """y [rows, sum of out] rescaled and shifted in place."""
        if self.affine.scales.touch(owners.slots) or self.affine.shifts.touch(owners.slots):
            self._kernels.affine_rows(y, owners, self.affine.scales, self.affine.shifts)


class AdapterLinear(nn.Module):
    """A linear module of the base in its place, unchanged, between its adapters' changes of input and output."""

    def __init__(
        self, inner: nn.Module, tables: SiteTables, kernels: Kernels, context: Context, *, head: bool
    ) -> None:
        """`head`: it is the LM head, which sees only the rows to sample from."""
        super().__init__()
        self.inner = inner
        self.tables = tables
        self.kernels = kernels
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
        if owners.affine:
            rows = self.tables.change_input(rows, owners)
        y: torch.Tensor = self.inner(rows.view(x.shape))
        flat = y.view(-1, y.shape[-1])
        self.kernels.add_low_rank(rows, flat, owners, self.tables.low_rank)
        if owners.affine:
            self.tables.change_output(flat, owners)
        return y


def hook_linears(
    model: nn.Module,
    sites: Sequence[Site],
    slots: int,
    kernels: Kernels,
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
        wrapped = AdapterLinear(inner, tables, kernels, context, head=inner is head)
        setattr(model.get_submodule(parent), leaf, wrapped)
        hooked.append(tables)
    return hooked


def hook_sublayer(module: nn.Module, table: BottleneckTable, kernels: Kernels, context: Context) -> None:
    """Let the bottlenecks of `table` work on what an attention or MLP block returns."""

    def after(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        owners = context.batch.owners
        if not owners.bottleneck:
            return
        x = args[0] if args else kwargs["hidden_states"]
        y = output[0] if isinstance(output, tuple) else output
        add_bottlenecks(x.view(-1, x.shape[-1]), y.view(-1, y.shape[-1]), owners, table, kernels)

    module.register_forward_hook(after, with_kwargs=True)


def add_bottlenecks(
    x: torch.Tensor, y: torch.Tensor, owners: Owners, table: BottleneckTable, kernels: Kernels
) -> None:
    """Change a sublayer's output y [rows, hidden] in place; x [rows, hidden] was its input. Contiguous."""
    for parallel in (False, True):
        if table.touch(owners.slots, parallel=parallel):
            kernels.add_bottleneck(x, y, owners, table, parallel=parallel)
