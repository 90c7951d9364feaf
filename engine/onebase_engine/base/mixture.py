"""Mixtures of experts: each expert's matrices as linear modules, and tokens sorted by the experts they are sent to.

transformers keeps a layer's experts in two parameters [experts, out, in], which nothing quantises or adapts. Here
they are split into linear modules, `mlp.experts.3.gate_up_proj`, and the router is one, `mlp.gate`: they are held
in 4 bits, adapted and trained as every other linear module is, and only the way of the tokens is new.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import nn

Make = Callable[[nn.Linear], nn.Linear]
"""Makes a linear module what the base holds in its place, e.g. one in 4 bits."""

_BLOCKS = ("MixtralSparseMoeBlock", "Qwen3MoeSparseMoeBlock")
"""transformers' blocks that compute what `Mixture` does: softmax over all experts, the best of them, no bias."""
_KINDS = ("mixtral", "qwen3_moe")
"""The model types that have them; `families.py` lists what is served of any kind."""


def is_mixture(config: Any) -> bool:
    """Whether a transformers configuration is that of such a mixture."""
    return config.model_type in _KINDS


@dataclass(frozen=True)
class Routes:
    """Pairs of a token and an expert that it is sent to, sorted by expert."""

    order: torch.Tensor
    """[pairs] int64: token * choices + choice."""
    bounds: Sequence[int]
    """[experts + 1]: expert e has the pairs bounds[e] to bounds[e + 1]."""
    choices: int
    """Experts of a token."""

    @classmethod
    def of(cls, chosen: torch.Tensor, experts: int) -> "Routes":
        """`chosen` [T, choices] int64: each token's experts."""
        flat = chosen.flatten()
        ends = torch.bincount(flat, minlength=experts).cumsum(0).tolist()
        return cls(flat.argsort(stable=True), [0, *ends], chosen.shape[1])

    @property
    def tokens(self) -> torch.Tensor:
        """[pairs] int64: the token of each."""
        return self.order // self.choices

    def combine(self, parts: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """What experts gave [pairs, width], and how much of it each token takes [T, choices], to [T, width]."""
        given = parts[self.order.argsort()].view(*weights.shape, -1).float() * weights.float()[..., None]
        return _sum_in_turn(given).to(parts.dtype)


def _sum_in_turn(values: torch.Tensor) -> torch.Tensor:
    """The sum over the second dimension, in one order however many rows there are."""
    total = values[:, 0]
    for place in range(1, values.shape[1]):
        total = total + values[:, place]
    return total


class Expert(nn.Module):
    """down(act(gate) * up)."""

    def __init__(self, gate_up_proj: nn.Linear, down_proj: nn.Linear, act: nn.Module) -> None:
        super().__init__()
        self.gate_up_proj = gate_up_proj
        self.down_proj = down_proj
        self.act = act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, -1)
        down: torch.Tensor = self.down_proj(self.act(gate) * up)
        return down


class Experts(nn.ModuleList):
    """A layer's experts, one after another, each on the tokens that are sent to it."""

    def forward(self, rows: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """rows [T, hidden] and their experts, as `Mixture` chooses them, to [T, hidden]."""
        routes = Routes.of(chosen, len(self))
        sent = rows[routes.tokens]
        parts = [
            expert(sent[first:last])
            for expert, (first, last) in zip(self, pairwise(routes.bounds), strict=True)
            if last > first
        ]
        return routes.combine(torch.cat(parts), weights)


class Mixture(nn.Module):
    """In the place of transformers' block: a router, and experts of which each token takes the best few (Shazeer et
    al. 2017, section 2, without noise; Jiang et al. 2024, section 2.1)."""

    def __init__(self, gate: nn.Linear, experts: nn.Module, choices: int, *, normalised: bool) -> None:
        """`normalised`: a token's weights sum to 1; else they are shares of all experts."""
        super().__init__()
        self.gate = gate
        self.experts = experts
        self.choices = choices
        self.normalised = normalised

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., hidden] to the same."""
        rows = hidden.reshape(-1, hidden.shape[-1])
        shares = self.gate(rows).softmax(-1, dtype=torch.float32)
        weights, chosen = shares.topk(self.choices, -1)
        if self.normalised:
            weights = weights / _sum_in_turn(weights)[:, None]
        made: torch.Tensor = self.experts(rows, chosen, weights)
        return made.view(hidden.shape)


def split_mixture(model: nn.Module, make: Make) -> None:
    """Replace transformers' blocks, one at a time, so that no more than one is there twice."""
    names = [name for name, module in model.named_modules() if type(module).__name__ in _BLOCKS]
    for name in names:
        model.set_submodule(name, _split(model.get_submodule(name), make))


def _split(block: Any, make: Make) -> Mixture:
    held, router = block.experts, block.gate
    experts = [
        Expert(make(_linear(up)), make(_linear(down)), held.act_fn)
        for up, down in zip(held.gate_up_proj.data, held.down_proj.data, strict=True)
    ]
    normalised = getattr(router, "norm_topk_prob", True)
    return Mixture(_linear(router.weight.data), Experts(experts), router.top_k, normalised=normalised)


def _linear(weight: torch.Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


def joined(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A model's parameters by name, with split experts put together again, as transformers has them."""
    whole: dict[str, torch.Tensor] = {}
    apart: dict[str, list[tuple[int, torch.Tensor]]] = {}
    for name, value in state.items():
        owner, found, rest = name.partition(".experts.")
        if not found:
            whole[name] = value
            continue
        expert, parameter, _ = rest.split(".")
        apart.setdefault(f"{owner}.experts.{parameter}", []).append((int(expert), value))
    return whole | {
        name: torch.stack([value for _, value in sorted(found, key=lambda one: one[0])])
        for name, found in apart.items()
    }
