"""Low-rank updates on CPUs against their definition, and that no row depends on its neighbours."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from onebase_engine.kernels.cpu import backend
from onebase_engine.kernels.reference import backend as reference
from onebase_engine.kernels.tiles import low_rank_tiles
from support.batches import make_owners, make_table, random_bf16


@given(
    in_features=st.integers(1, 40).map(lambda n: 4 * n),
    outs=st.lists(st.integers(1, 150), min_size=1, max_size=3),
    ranks=st.lists(st.lists(st.integers(0, 40), min_size=3, max_size=3), min_size=1, max_size=4),
    slots=st.lists(st.integers(0, 4), min_size=1, max_size=24),
)
def test_equals_its_definition(in_features: int, outs: list[int], ranks: list[list[int]], slots: list[int]) -> None:
    ranks = [each[: len(outs)] for each in ranks]
    slots = [slot % (len(ranks) + 1) for slot in slots]
    x, y = random_bf16(1, len(slots), in_features), random_bf16(2, len(slots), sum(outs))
    ours, definition = y.clone(), y.clone()
    backend.add_low_rank(x, ours, make_owners(slots, backend), make_table(backend, in_features, outs, ranks))
    reference.add_low_rank(
        x, definition, make_owners(slots, reference), make_table(reference, in_features, outs, ranks)
    )
    # Sums in another order may round to the next bfloat16.
    torch.testing.assert_close(ours, definition, rtol=2**-7, atol=1e-3)
    untouched = torch.tensor([slot == 0 for slot in slots])
    assert torch.equal(ours[untouched], y[untouched])


@given(slots=st.lists(st.integers(0, 3), min_size=1, max_size=40), seed=st.integers(0, 5))
def test_a_row_is_the_same_alone_and_in_any_company(slots: list[int], seed: int) -> None:
    table = make_table(backend, 64, [70, 33], [[8, 3], [17, 0], [1, 64]])
    x, y = random_bf16(seed, len(slots), 64), random_bf16(seed + 1, len(slots), 103)
    together = y.clone()
    backend.add_low_rank(x, together, make_owners(slots, backend), table)
    for row, slot in enumerate(slots):
        alone = y[row : row + 1].clone()
        backend.add_low_rank(x[row : row + 1].contiguous(), alone, make_owners([slot], backend), table)
        assert torch.equal(alone[0], together[row])


def test_an_emptied_slot_changes_nothing() -> None:
    table = make_table(backend, 32, [32], [[4], [4]])
    table.clear(1)
    x, y = random_bf16(1, 2, 32), random_bf16(2, 2, 32)
    changed = y.clone()
    backend.add_low_rank(x, changed, make_owners([1, 2], backend), table)
    assert torch.equal(changed[0], y[0])
    assert not torch.equal(changed[1], y[1])


def test_an_overflow_stays_in_its_row() -> None:
    table = make_table(backend, 32, [48], [[4]])
    x, y = random_bf16(1, 4, 32), random_bf16(2, 4, 48)
    expected = y.clone()
    backend.add_low_rank(x, expected, make_owners([1] * 4, backend), table)
    x[2] = torch.inf
    changed = y.clone()
    backend.add_low_rank(x, changed, make_owners([1] * 4, backend), table)
    assert not changed[2].isfinite().any()
    rest = [0, 1, 3]
    assert torch.equal(changed[rest], expected[rest])


@given(slots=st.lists(st.integers(0, 5), max_size=60), tile=st.sampled_from([1, 4, 16]))
def test_tiles_hold_each_adapters_row_once_and_one_slot_each(slots: list[int], tile: int) -> None:
    tiles = low_rank_tiles(np.array(slots, np.int32), tile)
    seen = []
    for slot, *rows in tiles.tolist():
        present = [row for row in rows if row >= 0]
        assert present
        assert rows == present + [-1] * (tile - len(present))
        assert {slots[row] for row in present} == {slot}
        seen += present
    assert sorted(seen) == [row for row, slot in enumerate(slots) if slot]
    assert len(tiles) == sum(-(-slots.count(slot) // tile) for slot in set(slots) - {0})


@pytest.mark.parametrize("rank", [1, 15, 16, 17, 64, 100])
def test_weights_may_end_anywhere(rank: int) -> None:
    """The kernel reads whole vectors past a matrix' end; what lies there must not count."""
    table = make_table(backend, 64, [65], [[rank], [rank]])
    definition = make_table(reference, 64, [65], [[rank], [rank]])
    x, y = random_bf16(1, 2, 64), torch.zeros(2, 65, dtype=torch.bfloat16)
    ours, expected = y.clone(), y.clone()
    backend.add_low_rank(x, ours, make_owners([1, 2], backend), table)
    reference.add_low_rank(x, expected, make_owners([1, 2], reference), definition)
    torch.testing.assert_close(ours, expected, rtol=2**-7, atol=1e-3)
