"""A mixture's experts in serving: a step's tokens sorted by expert, each matrix of all experts as one product, and
each token's adapter at the experts that it is sent to."""

from typing import Any

import numpy as np
import torch
from torch import nn

from onebase_adapters.base_shape import BaseShape
from onebase_engine.base.mixture import Experts, Mixture, Routes
from onebase_engine.kernels.interface import Kernels
from onebase_engine.kernels.site_tables import ExpertTables, SiteTables
from onebase_engine.runner.batching import Context


class RoutedExperts(nn.Module):
    """In the place of `Experts`, to the same result for each token with its adapter."""

    def __init__(
        self, inner: Experts, tables: tuple[ExpertTables, ExpertTables], kernels: Kernels, context: Context
    ) -> None:
        """`tables`: of `gate_up_proj` and of `down_proj`."""
        super().__init__()
        self.inner = inner
        self._tables = tables
        experts: list[Any] = list(inner)
        self._gate_up = kernels.group([expert.gate_up_proj for expert in experts])
        self._down = kernels.group([expert.down_proj for expert in experts])
        self._act = experts[0].act
        self._context = context

    def forward(self, rows: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        owners = self._context.batch.owners
        if len(rows) != len(owners.slots):
            # As in `AdapterLinear`.
            raise RuntimeError(
                f"{self._tables[0].sites[0].name} was given {len(rows)} rows of {len(owners.slots)}."
            )
        routes = Routes.of(chosen, len(self.inner))
        tables, bounds = self._tables, routes.bounds
        if len(owners.tiles):
            experts = np.repeat(np.arange(len(self.inner)), np.diff(bounds))
            slots = owners.slots[routes.tokens.cpu().numpy()]
            owners = tables[0].owners(slots, experts, affine=owners.affine)
        sent = rows[routes.tokens]
        gate, up = tables[0].apply(sent, owners, lambda x: self._gate_up(x, bounds)).chunk(2, -1)
        made = tables[1].apply(self._act(gate) * up, owners, lambda x: self._down(x, bounds))
        return routes.combine(made, weights)


def routers_of(model: nn.Module) -> list[nn.Linear]:
    """A mixture's routers. Which expert is best must not depend on a row's company."""
    return [module.gate for module in model.modules() if isinstance(module, Mixture)]


def hook_experts(
    model: nn.Module, shape: BaseShape, slots: int, kernels: Kernels, context: Context, device: torch.device
) -> list[SiteTables]:
    """Replace a mixture's experts in their places; gives their tables."""
    hooked: list[SiteTables] = []
    for name, module in list(model.named_modules()):
        if not isinstance(module, Experts):
            continue
        gate_up, down = (
            ExpertTables([shape.sites[f"{name}.{e}.{matrix}"] for e in range(len(module))], slots, kernels, device)
            for matrix in ("gate_up_proj", "down_proj")
        )
        model.set_submodule(name, RoutedExperts(module, (gate_up, down), kernels, context))
        hooked += [gate_up, down]
    return hooked
