"""Paged attention on CPUs against its definition; a token's result depends on nothing but its own sequence."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from onebase_engine.kernels.batch import BLOCK
from onebase_engine.kernels.cpu import backend
from onebase_engine.kernels.reference import backend as reference
from onebase_engine.kernels.tiles import query_tiles
from support.batches import deal_pages, make_batch, random_bf16

PAGES = 64


class Cache:
    """Pages full of NaN, and sequences' queries, keys and values."""

    def __init__(self, lengths: Sequence[int], kv_heads: int, group: int, dim: int, seed: int = 0) -> None:
        self.kv_heads = kv_heads
        self.k = torch.full((PAGES, kv_heads, dim, BLOCK), torch.nan, dtype=torch.bfloat16)
        self.v = torch.full((PAGES, kv_heads, BLOCK, dim), torch.nan, dtype=torch.bfloat16)
        self.pages = deal_pages(lengths, seed, PAGES)
        self.q = [random_bf16(seed + 10 + i, n, kv_heads * group, dim) for i, n in enumerate(lengths)]
        self.keys = [random_bf16(seed + 30 + i, n, kv_heads, dim) for i, n in enumerate(lengths)]
        self.values = [random_bf16(seed + 50 + i, n, kv_heads, dim) for i, n in enumerate(lengths)]

    def run(
        self, runs: Sequence[tuple[int, int, int]], window: int | None = None, kernels: object = backend
    ) -> list[torch.Tensor]:
        """One step over `runs` (sequence, start, count); each run's results."""
        pages = [self.pages[sequence] for sequence, _, _ in runs]
        batch = make_batch([run[1:] for run in runs], kernels, self.kv_heads, pages)
        q, k, v = (
            torch.cat([each[sequence][start : start + count] for sequence, start, count in runs])
            for each in (self.q, self.keys, self.values)
        )
        kernels.write_kv(k, v, self.k, self.v, batch)
        out = kernels.attend(q, self.k, self.v, batch, 0.3, window)
        return list(out.split([count for _, _, count in runs]))


shapes = st.tuples(st.integers(1, 3), st.integers(1, 5), st.sampled_from([16, 48, 64, 80, 128]))
"""kv heads, query heads for each, dim"""
windows = st.sampled_from([None, 1, 7, 16, 33])


@given(lengths=st.lists(st.integers(1, 70), min_size=1, max_size=5), shape=shapes, window=windows)
def test_equals_its_definition(lengths: list[int], shape: tuple[int, int, int], window: int | None) -> None:
    runs = [(i, 0, n) for i, n in enumerate(lengths)]
    ours = Cache(lengths, *shape).run(runs, window)
    definition = Cache(lengths, *shape).run(runs, window, reference)
    for mine, right in zip(ours, definition, strict=True):
        torch.testing.assert_close(mine, right, rtol=2**-7, atol=2**-8)


@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=4),
    sizes=st.lists(st.integers(1, 37), min_size=1, max_size=4),
    shape=shapes,
    window=windows,
)
def test_a_token_is_the_same_whole_or_in_chunks_alone_or_with_others(
    lengths: list[int], sizes: list[int], shape: tuple[int, int, int], window: int | None
) -> None:
    alone = [Cache(lengths, *shape).run([(i, 0, n)], window)[0] for i, n in enumerate(lengths)]
    cache = Cache(lengths, *shape)
    done = [0] * len(lengths)
    turn = 0
    while any(at < n for at, n in zip(done, lengths, strict=True)):
        runs = []
        for i, n in enumerate(lengths):
            if done[i] < n:
                runs.append((i, done[i], min(sizes[turn % len(sizes)], n - done[i])))
                turn += 1
        for (i, start, count), found in zip(runs, cache.run(runs, window), strict=True):
            assert torch.equal(found, alone[i][start : start + count])
            done[i] += count


def test_pages_of_a_known_prefix_serve_as_if_they_had_been_computed() -> None:
    cache = Cache([50], 2, 3, 64)
    (whole,) = cache.run([(0, 0, 50)])
    again = Cache([50], 2, 3, 64)
    again.k, again.v, again.pages = cache.k, cache.v, cache.pages
    (rest,) = again.run([(0, 32, 18)])
    assert torch.equal(rest, whole[32:])


@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=12), kv_heads=st.integers(1, 3))
def test_items_hold_each_token_and_head_once(lengths: list[int], kv_heads: int) -> None:
    query_start = np.concatenate([[0], np.cumsum(lengths)])
    rows = np.repeat(np.arange(len(lengths)), lengths)
    positions = np.arange(query_start[-1]) - query_start[rows]
    seen = set()
    for sequence, first, tokens, head in backend.attention_items(query_start, positions, kv_heads).tolist():
        assert query_start[sequence] <= first < first + tokens <= query_start[sequence + 1]
        for token in range(first, first + tokens):
            assert (token, head) not in seen
            seen.add((token, head))
    assert len(seen) == query_start[-1] * kv_heads
    assert len(query_tiles(query_start)) * kv_heads == len(
        backend.attention_items(query_start, positions, kv_heads)
    )


@pytest.mark.parametrize("stride", [0, 24])
def test_keys_and_values_land_in_their_pages(stride: int) -> None:
    """Also where rows are parts of wider ones, as in a merged projection's output."""
    lengths = [19, 3]
    pages = deal_pages(lengths, 3, PAGES)
    batch = make_batch([(0, 19), (0, 3)], backend, 2, pages)
    wide = random_bf16(1, 22, 2 * 2 * 16 + stride)
    k, v = wide[:, :32].view(22, 2, 16), wide[:, 32:64].view(22, 2, 16)
    ours = [torch.zeros(PAGES, 2, 16, BLOCK).bfloat16(), torch.zeros(PAGES, 2, BLOCK, 16).bfloat16()]
    definition = [cache.clone() for cache in ours]
    backend.write_kv(k, v, *ours, batch)
    reference.write_kv(k, v, *definition, batch)
    for mine, right in zip(ours, definition, strict=True):
        assert torch.equal(mine, right)
