"""What the parity tests share: each family served, and its oracles."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from onebase_engine.base.base_spec import BaseSpec
from onebase_engine.runner.batched_model import ServedModel
from support.models import targets
from support.peers import load_exact, load_plain, with_adapters
from support.serving import put


@dataclass(frozen=True)
class Served:
    """A family's tiny model, served with its adapters, and the same in its two oracles."""

    model: ServedModel
    slots: dict[Path | None, int]
    """By adapter; None is the base."""
    plain: Any
    exact: Any


@pytest.fixture(scope="session")
def served(tiny_model: Callable[[str], Path], tiny_lora: Callable[..., Path]) -> Callable[[str], Served]:
    """A family with three adapters: rank 8 everywhere; an odd rank, rank-stabilised, on some sites; two ranks on
    others."""

    def make(family: str) -> Served:
        folder = tiny_model(family)
        names = list(targets(family))
        adapters = [
            tiny_lora(family, rank=8, modules=names, seed=1),
            tiny_lora(family, rank=3, modules=names[:2], seed=2, use_rslora=True),
            tiny_lora(
                family, rank=16, modules=names[1:], seed=3,
                rank_pattern={names[1]: 5}, alpha_pattern={names[-1]: 11},
            ),
        ]  # fmt: skip
        model = ServedModel.load(BaseSpec(str(folder), device="cpu"), slots=4, blocks=512)
        slots: dict[Path | None, int] = {None: 0} | {adapter: put(model, adapter) for adapter in adapters}
        return Served(
            model, slots, with_adapters(load_plain(folder), adapters), with_adapters(load_exact(folder), adapters)
        )

    return cache(make)


@pytest.fixture(scope="session")
def prompt() -> Callable[[int, int], list[int]]:
    """`prompt(length, seed)`: random tokens."""

    def make(length: int, seed: int = 0) -> list[int]:
        return torch.randint(3, 380, (length,), generator=torch.Generator().manual_seed(seed)).tolist()

    return make
