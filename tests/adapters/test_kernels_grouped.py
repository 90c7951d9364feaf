"""The product of rows with one of many 4-bit weights each: the definition's bits, a row alone and in company; and
adapters at experts, each expert's part as an adapter of its own."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from onebase_adapters.base_shape import Site
from onebase_adapters.primitives.by_site import Parts
from onebase_adapters.primitives.instruction_set import LowRank, Rescale, Shift
from onebase_adapters.primitives.lowered_adapter import LoweredAdapter
from onebase_engine.base.mixture import Routes
from onebase_engine.kernels.arena import Arena
from onebase_engine.kernels.cpu import backend as cpu
from onebase_engine.kernels.cpu.grouped import GroupedLinear
from onebase_engine.kernels.cpu.packed import packable
from onebase_engine.kernels.linear4bit import in_4bit
from onebase_engine.kernels.reference import backend as reference
from onebase_engine.kernels.site_tables import ExpertTables
from support.batches import random_bf16

EXPERTS, IN, OUT = 5, 192, 160


def experts(quant_type: str = "nf4", *, out: int = OUT, double: bool = False) -> list[nn.Linear]:
    made = []
    for seed in range(EXPERTS):
        linear = nn.Linear(IN, out, bias=False, dtype=torch.bfloat16).requires_grad_(False)
        linear.weight.copy_(random_bf16(seed, out, IN) * 0.1)
        made.append(in_4bit(linear, quant_type, double_quant=double))
    return made


packs = pytest.mark.skipif(not all(map(packable, experts())), reason="needs AVX2 and FMA, or NEON")


@packs
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("counts", [(3, 0, 1, 9, 4), (0, 0, 0, 1, 0), (1, 300, 0, 257, 2)])
def test_each_row_is_multiplied_by_its_own_weight(counts: tuple[int, ...], quant_type: str, double: bool) -> None:
    modules = experts(quant_type, double=double)
    bounds = [0, *np.cumsum(counts).tolist()]
    x = random_bf16(7, bounds[-1], IN)
    wanted = reference.group(experts(quant_type, double=double))(x, bounds)
    grouped = cpu.group(modules)
    assert isinstance(grouped, GroupedLinear)
    found = grouped(x, bounds)
    assert torch.equal(found, wanted)
    for expert, (first, last) in enumerate(pairwise(bounds)):
        for row in range(first, min(last, first + 3)):
            alone = [0] * (expert + 1) + [1] * (EXPERTS - expert)
            assert torch.equal(grouped(x[row : row + 1], alone)[0], found[row])


def test_sizes_that_do_not_pack_take_the_definition() -> None:
    assert not isinstance(cpu.group(experts(out=40)), GroupedLinear)


def test_routes_sort_and_combine() -> None:
    chosen = torch.tensor([[2, 0], [1, 2], [2, 1]])
    routes = Routes.of(chosen, 4)
    assert routes.tokens.tolist() == [0, 1, 2, 0, 1, 2]
    assert list(routes.bounds) == [0, 1, 3, 6, 6]
    weights = torch.tensor([[0.5, 0.25], [1.0, 2.0], [4.0, 8.0]])
    given = torch.tensor([[1.0], [10.0], [20.0], [100.0], [200.0], [300.0]])  # as experts 0, 1, 1, 2, 2, 2 gave it
    assert routes.combine(given, weights)[:, 0].tolist() == [50.25, 410.0, 1360.0]


@packs
@pytest.mark.parametrize("kernels", [cpu, reference], ids=["cpu", "reference"])
def test_an_adapter_changes_the_experts_that_it_has_something_for(kernels: cpu) -> None:
    sites = [Site(f"experts.{expert}.down_proj", IN, OUT) for expert in range(EXPERTS)]
    tables = ExpertTables(sites, 3, kernels, torch.device("cpu"))
    updates = {
        (slot, expert): LowRank(sites[expert].name, random_bf16(slot, 4, IN).float(),
                                random_bf16(9 + expert, OUT, 4).float() * 0.1, 0.5)
        for slot, expert in ((1, 0), (1, 3), (2, 3), (2, 4))
    }  # fmt: skip
    rescale, shift = Rescale(sites[3].name, torch.full((IN,), 2.0), "input"), Shift(sites[4].name, torch.ones(OUT))
    held = []
    for slot in (1, 2):
        primitives = [update for (owner, _), update in updates.items() if owner == slot]
        more = [rescale, shift] if slot == 2 else []
        parts = Parts.of(LoweredAdapter("", "lora", (*primitives, *more)))
        held.append(Arena(tables.size(parts), torch.device("cpu")))
        tables.put(slot, parts, held[-1])
    which = np.array([0, 0, 3, 3, 3, 4, 4])
    slots = np.array([1, 2, 0, 1, 2, 1, 2], np.int32)
    x = random_bf16(3, len(slots), IN)
    weight = random_bf16(4, OUT, IN) * 0.1

    def found() -> torch.Tensor:
        owners = tables.owners(slots, which, affine=True)
        return tables.apply(x.clone(), owners, lambda rows: nn.functional.linear(rows, weight)).float()

    def wanted(present: set[int]) -> torch.Tensor:
        rows = []
        for row, slot, expert in zip(x.float(), slots.tolist(), which.tolist(), strict=True):
            mine = slot in present
            given = row * 2 if mine and (slot, expert) == (2, 3) else row
            out = weight.float() @ given
            if mine and (update := updates.get((slot, expert))) is not None:
                out = out + update.scale * (update.b @ (update.a @ given))
            rows.append(out + 1 if mine and (slot, expert) == (2, 4) else out)
        return torch.stack(rows)

    torch.testing.assert_close(found(), wanted({1, 2}), rtol=0.02, atol=0.05)
    assert tables.touch(np.array([1 + 3 * 3])) and not tables.touch(np.array([1 + 4 * 3]))
    tables.clear(1)
    torch.testing.assert_close(found(), wanted({2}), rtol=0.02, atol=0.05)
