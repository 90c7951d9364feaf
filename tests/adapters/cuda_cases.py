"""The GPU kernels against their definitions, on a GPU or in triton's interpreter. `test_cuda_kernels` runs this
file in a process of its own, because triton looks for its interpreter only while it is imported.

Activations are float32, where the interpreter rounds as a GPU does; its bfloat16 is cut off.
"""

import copy
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit

from onebase_adapters.primitives.instruction_set import LowRank
from onebase_adapters.primitives.lowered_adapter import LoweredAdapter
from onebase_engine.base.base_spec import BaseSpec
from onebase_engine.kernels.batch import BLOCK
from onebase_engine.kernels.cuda import backend
from onebase_engine.kernels.cuda.matmul4bit import Packed
from onebase_engine.kernels.interface import Kernels
from onebase_engine.kernels.reference import backend as reference
from onebase_engine.runner import batched_model as served
from onebase_engine.runner.batched_model import ServedModel
from onebase_engine.runner.batching import Chunk
from onebase_engine.runner.step_replay import CudaCapture, Scores
from support.batches import (
    deal_pages,
    make_batch,
    make_bottlenecks,
    make_linear4bit,
    make_owners,
    make_table,
    make_vectors,
    random_bf16,
)
from support.models import save_model

# Keys that nobody wrote are multiplied, too, and not looked at.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered in")

INTERPRETED = bool(os.environ.get("TRITON_INTERPRET"))
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
TOLERANCE = 5e-6 if INTERPRETED else 1e-2
"""The error allowed, as a share of the largest result: a GPU multiplies bfloat16."""
PAGES = 160


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def assert_near(found: torch.Tensor, definition: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    largest = definition.abs().max().item()
    torch.testing.assert_close(found, definition, rtol=0.0, atol=tolerance * largest)


@pytest.fixture
def products_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """BLAS, which the interpreter multiplies with, sums a row differently by its place in the matrix; a tensor core
    does not."""
    if not INTERPRETED:
        return

    def matmul(a: np.ndarray, b: np.ndarray, dtype: np.dtype) -> np.ndarray:
        return np.stack([(row[:, None] * b).sum(0, dtype=dtype) for row in a])

    monkeypatch.setattr(np, "matmul", matmul)


@pytest.mark.parametrize(
    ("in_features", "outs", "ranks", "slots"),
    [
        (64, [64], [[8]], [1]),
        (1100, [70, 33, 130], [[1, 3, 8], [64, 0, 16], [0, 0, 0], [0, 5, 0]], [0, 1, 1, 2, 3, 4, *[2] * 20, 0]),
        (2100, [65], [[r] for r in range(1, 65, 9)], [7, 3, 1, 0, 5, 5, 2, 6, 4]),
        (17, [1, 5], [[17, 33], [2, 0]], [2, 1, 1] * 12),
    ],
)
def test_low_rank_equals_its_definition(
    in_features: int, outs: list[int], ranks: list[list[int]], slots: list[int]
) -> None:
    x, y = normal(1, len(slots), in_features), normal(2, len(slots), sum(outs))
    ours, definition = y.clone(), y.clone()
    backend.add_low_rank(
        x, ours, make_owners(slots, backend), make_table(backend, in_features, outs, ranks, device=DEVICE)
    )
    reference.add_low_rank(
        x, definition, make_owners(slots, reference), make_table(reference, in_features, outs, ranks, device=DEVICE)
    )
    assert_near(ours, definition)
    untouched = torch.tensor([slot == 0 for slot in slots])
    assert torch.equal(ours[untouched], y[untouched])


def test_low_rank_takes_bfloat16() -> None:
    x, y = random_bf16(1, 5, 96).to(DEVICE), random_bf16(2, 5, 48).to(DEVICE)
    ours, definition = y.clone(), y.clone()
    table, owners = make_table(backend, 96, [48], [[8], [3]], device=DEVICE), make_owners([1, 2, 0, 1, 1], backend)
    backend.add_low_rank(x, ours, owners, table)
    reference.add_low_rank(x, definition, owners, table)
    assert_near(ours, definition, 2**-7)


@pytest.mark.usefixtures("products_by_row")
def test_a_low_rank_row_is_the_same_alone_and_in_any_company() -> None:
    slots = [3, 1, 0, 2, *[1] * 17, 3, 2, 2]
    table = make_table(backend, 1100, [70, 33], [[8, 3], [17, 0], [1, 64]], device=DEVICE)
    x, y = normal(1, len(slots), 1100), normal(2, len(slots), 103)
    together = y.clone()
    backend.add_low_rank(x, together, make_owners(slots, backend), table)
    for row in (0, 1, 3, 4, 20, 21, 23):
        alone = y[row : row + 1].clone()
        backend.add_low_rank(x[row : row + 1].contiguous(), alone, make_owners([slots[row]], backend), table)
        assert torch.equal(alone[0], together[row])


def test_an_emptied_slot_changes_nothing() -> None:
    table = make_table(backend, 32, [32], [[4], [4]], device=DEVICE)
    x, y = normal(1, 2, 32), normal(2, 2, 32)
    backend.add_low_rank(x, y.clone(), make_owners([1, 2], backend), table)
    table.clear(1)
    changed = y.clone()
    backend.add_low_rank(x, changed, make_owners([1, 2], backend), table)
    assert torch.equal(changed[0], y[0])
    assert not torch.equal(changed[1], y[1])


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_an_overflow_stays_in_its_row() -> None:
    table = make_table(backend, 32, [48], [[4]], device=DEVICE)
    x, y = normal(1, 4, 32), normal(2, 4, 48)
    owners = make_owners([1] * 4, backend)
    expected = y.clone()
    backend.add_low_rank(x, expected, owners, table)
    x[2] = torch.inf
    changed = y.clone()
    backend.add_low_rank(x, changed, owners, table)
    assert not changed[2].isfinite().any()
    rest = [0, 1, 3]
    assert torch.equal(changed[rest], expected[rest])


@pytest.mark.parametrize("parallel", [False, True])
def test_bottlenecks_equal_their_definition(parallel: bool) -> None:
    slots = [0, 1, 2, 3, 4, 5, 6, 12, 7, 8, 9, 10, 11, 13, 13, *[3] * 17, 2, 2]
    ranks = [3, 17, 64, 8, 8, 1, 5, 8, 9, 10, 40, 12, 0]
    x, y = normal(1, len(slots), 1100), normal(2, len(slots), 1100)
    ours, definition = y.clone(), y.clone()
    for kernels, changed in ((backend, ours), (reference, definition)):
        table = make_bottlenecks(kernels, 1100, ranks, DEVICE)
        kernels.add_bottleneck(x, changed, make_owners(slots, kernels), table, parallel=parallel)
    assert_near(ours, definition)
    untouched = torch.tensor([slot in (0, 13) or bool(slot % 2) != parallel for slot in slots])
    assert torch.equal(ours[untouched], y[untouched])


def test_rows_are_scaled_and_shifted_by_slot() -> None:
    slots, y = [0, 1, 2, 3, 1, 4, 0], normal(1, 7, 1300)
    scales, shifts = make_vectors(1300, 5, [1, 2], DEVICE), make_vectors(1300, 5, [2, 3], DEVICE)
    ours, definition = y.clone(), y.clone()
    backend.affine_rows(ours, make_owners(slots, backend), scales, shifts)
    reference.affine_rows(definition, make_owners(slots, reference), scales, shifts)
    assert_near(ours, definition)
    scales.clear(1)
    backend.affine_rows(ours, make_owners([1, 0, 0, 0, 1, 0, 0], backend), scales, shifts)
    assert_near(ours, definition)


@pytest.mark.parametrize(
    ("in_features", "outs", "bias"), [(64, [32, 96], False), (192, [70], True), (640, [128, 32], True)]
)
def test_products_equal_those_with_the_expanded_weight(in_features: int, outs: list[int], bias: bool) -> None:
    modules = [make_linear4bit(n, in_features, out, bias=bias, device=DEVICE) for n, out in enumerate(outs)]
    states = [copy.copy(module.weight.quant_state) for module in modules]
    for state in states:
        state.dtype = torch.float32 if INTERPRETED else torch.bfloat16
    expanded = [dequantize_4bit(m.weight.data, state) for m, state in zip(modules, states, strict=True)]
    weight = torch.cat(expanded).float()
    product = Packed(modules)
    for rows in (1, 5, 150):
        x = random_bf16(rows, rows, in_features).to(DEVICE)
        definition = x.float() @ weight.t()
        if bias:
            definition += torch.cat([module.bias for module in modules]).float()
        assert_near(product(x.float() if INTERPRETED else x).float(), definition)
        # The modules do as they did, on what is theirs of the joined weight.
        assert_near(torch.cat([module(x) for module in modules], 1).float(), definition, 1e-2)


@pytest.mark.usefixtures("products_by_row")
def test_a_row_of_a_product_is_the_same_alone_or_with_others() -> None:
    product = Packed([make_linear4bit(1, 1280, 96, device=DEVICE)])
    x = random_bf16(2, 200, 1280).to(DEVICE)
    together = product(x)
    for first, last in ((0, 1), (1, 3), (7, 27), (30, 95), (0, 129)):
        assert torch.equal(product(x[first:last].contiguous()), together[first:last])


class Cache:
    """Pages full of NaN, and sequences' queries, keys and values."""

    def __init__(self, lengths: Sequence[int], kv_heads: int, group: int, dim: int) -> None:
        self.kv_heads = kv_heads
        self.k = torch.full((PAGES, kv_heads, dim, BLOCK), torch.nan, device=DEVICE)
        self.v = torch.full((PAGES, kv_heads, BLOCK, dim), torch.nan, device=DEVICE)
        self.pages = deal_pages(lengths, 0, PAGES)
        self.q = [normal(10 + i, n, kv_heads * group, dim) for i, n in enumerate(lengths)]
        self.keys = [normal(30 + i, n, kv_heads, dim) for i, n in enumerate(lengths)]
        self.values = [normal(50 + i, n, kv_heads, dim) for i, n in enumerate(lengths)]

    def run(
        self,
        runs: Sequence[tuple[int, int, int]],
        kernels: Kernels = backend,
        window: int | None = None,
        softcap: float | None = None,
    ) -> list[torch.Tensor]:
        """One step over `runs` (sequence, start, count); each run's results."""
        batch = make_batch(
            [run[1:] for run in runs], kernels, self.kv_heads, [self.pages[run[0]] for run in runs], DEVICE
        )
        q, k, v = (
            torch.cat([each[sequence][start : start + count] for sequence, start, count in runs])
            for each in (self.q, self.keys, self.values)
        )
        kernels.write_kv(k, v, self.k, self.v, batch)
        out = kernels.attend(q, self.k, self.v, batch, q.shape[-1] ** -0.5, window, softcap)
        return list(out.split([count for _, _, count in runs]))


@pytest.mark.parametrize(
    ("shape", "window", "softcap"),
    [
        ((2, 2, 16), None, None),
        ((1, 3, 64), 33, None),
        ((1, 1, 24), 1, 5.0),
        ((3, 1, 80), 16, None),
        ((1, 40, 32), None, 5.0),
        ((1, 4, 256), 7, None),
    ],
)
def test_attention_equals_its_definition(
    shape: tuple[int, int, int], window: int | None, softcap: float | None
) -> None:
    long = 130 if shape[1] < 40 else 40  # where each token is a program of its own
    lengths = [5, long, 70, 16]
    ours, definition = Cache(lengths, *shape), Cache(lengths, *shape)
    for runs in (
        [(0, 0, 5), (1, 0, long - 1), (2, 0, 40)],
        [(1, long - 1, 1), (2, 40, 30), (3, 0, 16)],
    ):
        found = ours.run(runs, backend, window, softcap)
        for mine, right in zip(found, definition.run(runs, reference, window, softcap), strict=True):
            assert_near(mine, right)


def test_a_token_sees_as_far_as_it_is_told_to() -> None:
    ours, definition = Cache([70, 20], 1, 2, 16), Cache([70, 20], 1, 2, 16)
    found = []
    for cache, kernels in ((ours, backend), (definition, reference)):
        batch = make_batch([(0, 70), (0, 20)], kernels, 1, cache.pages, DEVICE)
        batch = replace(batch, visible=np.repeat([69, 19], [70, 20]))
        kernels.write_kv(torch.cat(cache.keys), torch.cat(cache.values), cache.k, cache.v, batch)
        found.append(kernels.attend(torch.cat(cache.q), cache.k, cache.v, batch, 0.3))
    assert_near(*found)
    assert not torch.allclose(found[0][:5], Cache([70], 1, 2, 16).run([(0, 0, 70)])[0][:5])


def test_a_long_table_is_read_to_its_end() -> None:
    ours, definition = Cache([2000], 1, 2, 16), Cache([2000], 1, 2, 16)
    for cache, kernels in ((ours, backend), (definition, reference)):
        batch = make_batch([(0, 1999)], reference, 1, cache.pages, DEVICE)
        reference.write_kv(cache.keys[0][:1999], cache.values[0][:1999], cache.k, cache.v, batch)
        cache.q[0] = cache.run([(0, 1999, 1)], kernels)[0]
    assert_near(ours.q[0], definition.q[0])


@pytest.mark.usefixtures("products_by_row")
@pytest.mark.parametrize("window", [None, 33])
def test_a_token_is_the_same_whole_or_in_chunks_alone_or_with_others(window: int | None) -> None:
    lengths, shape = [90, 70, 20], (1, 3, 16)
    alone = [Cache(lengths, *shape).run([(i, 0, n)], window=window)[0] for i, n in enumerate(lengths)]
    cache = Cache(lengths, *shape)
    for runs in (
        [(0, 0, 37), (1, 0, 1), (2, 0, 20)],
        [(0, 37, 1), (1, 1, 5)],
        [(1, 6, 60), (0, 38, 51)],
        [(0, 89, 1), (1, 66, 4)],
    ):
        for (i, start, count), found in zip(runs, cache.run(runs, window=window), strict=True):
            assert torch.equal(found, alone[i][start : start + count])


def test_keys_and_values_land_in_their_pages() -> None:
    """Also where rows are parts of wider ones, as in a merged projection's output."""
    batch = make_batch([(0, 19), (0, 3)], backend, 2, deal_pages([19, 3], 3, PAGES), DEVICE)
    wide = random_bf16(1, 22, 88).to(DEVICE)
    k, v = wide[:, :32].view(22, 2, 16), wide[:, 32:64].view(22, 2, 16)
    ours = [torch.zeros(PAGES, 2, *shape, device=DEVICE).bfloat16() for shape in ((16, BLOCK), (BLOCK, 16))]
    definition = [cache.clone() for cache in ours]
    backend.write_kv(k, v, *ours, batch)
    reference.write_kv(k, v, *definition, batch)
    for mine, right in zip(ours, definition, strict=True):
        assert torch.equal(mine, right)


def load_model(folder: Path, kernels: Kernels, monkeypatch: pytest.MonkeyPatch, blocks: int = 16) -> ServedModel:
    monkeypatch.setattr(served, "choose_kernels", lambda *_: kernels)
    return ServedModel.load(BaseSpec(str(folder), device=str(DEVICE)), slots=3, blocks=blocks)


def lora(model: ServedModel, rank: int, where: str = "") -> LoweredAdapter:
    """Random updates at the sites that have `where` in their names."""
    updates = [
        LowRank(
            site.name,
            random_bf16(rank + n, rank, site.in_features, scale=site.in_features**-0.5),
            random_bf16(rank - n, site.out_features, rank, scale=rank**-0.5),
            0.5,
        )
        for n, site in enumerate(model.shape.sites.values())
        if where in site.name
    ]
    return LoweredAdapter(f"{rank} {where}", "lora", tuple(updates))


def run_model(folder: Path, kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """The logits of a prefill and a decode, with and without adapters: on all sites of a layer, or one of each."""
    model = load_model(folder, kernels, monkeypatch)
    slots = [model.put(lora(model, 3, ".1.")), model.put(lora(model, 20, "q_proj"))]
    chunks = [
        [Chunk(range(5, 33), 0, [1, 2, 3], slot=slots[0]), Chunk([7, 8, 9], 0, [4], slot=slots[1])],
        [Chunk([5], 28, [1, 2, 3], slot=slots[0]), Chunk([1, 2], 0, [5]), Chunk([4], 3, [4], slot=slots[1])],
    ]
    return torch.cat([model.forward(step).logits(range(len(step))) for step in chunks]).float()


FUSED = ["llama", "mistral", "qwen2", "qwen3", "phi3", "gemma3"]


@pytest.mark.parametrize("family", ["llama-odd", "gemma2", *FUSED])
def test_a_model_runs_on_them(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_model(tmp_path, family)
    assert (load_model(folder, backend, monkeypatch)._fused is not None) == (family in FUSED)
    definition = run_model(folder, reference, monkeypatch)
    ours = run_model(folder, backend, monkeypatch)
    # The interpreter's bfloat16 is cut off, and fused layers have more of it, so not all digits are the same.
    assert_near(ours, definition, 0.06 if INTERPRETED and family in FUSED else 0.03)


def test_replayed_steps_are_those_that_run_kernel_by_kernel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through changes of who is there, and of which adapters are."""
    folder = save_model(tmp_path, "gemma2")
    plain, replayed = (load_model(folder, backend, monkeypatch, blocks=17) for _ in range(2))
    plain._replays = None
    captured: list[Callable[[], Scores]] = []

    def capture(run: Callable[[], Scores]) -> Callable[[], Scores]:
        captured.append(run)
        return run if INTERPRETED else CudaCapture()(run)

    replayed.replay_decodes(spare_block=16, capture=capture)

    def check(chunks: list[Chunk]) -> None:
        ours, theirs = (model.forward(chunks) for model in (replayed, plain))
        rows = range(len(chunks))
        assert_near(ours.logits(rows).float(), theirs.logits(rows).float(), 0.03)
        assert_near(ours.hidden(rows).float(), theirs.hidden(rows).float(), 0.03)

    first, _ = (model.put(lora(model, 3)) for model in (plain, replayed))
    check([Chunk(range(5, 45), 0, [1, 2, 3], slot=first), Chunk([7, 8, 9], 0, [4]), Chunk([7], 0, [5], slot=first)])
    assert not captured
    check([Chunk([5], 40, [1, 2, 3], slot=first), Chunk([6], 3, [4]), Chunk([4], 1, [5], slot=first)])
    check([Chunk([7], 41, [1, 2, 3], slot=first), Chunk([9], 4, [4])])
    check([Chunk([8], 42, [1, 2, 3], slot=first), Chunk([2], 5, [4], slot=first), Chunk([3], 2, [5])])
    assert len(captured) == 2  # of four rows, of two
    second, _ = (model.put(lora(model, 5, "q_proj")) for model in (plain, replayed))
    check([Chunk([8], 43, [1, 2, 3], slot=second), Chunk([2], 6, [4], slot=first), Chunk([3], 3, [5])])
    assert len(captured) == 3  # of four tiles
    for model in (plain, replayed):
        model.remove(first)
        assert model.put(lora(model, 40)) == first  # too wide for what was captured
    check([Chunk([8], 44, [1, 2, 3], slot=second), Chunk([2], 7, [4], slot=first), Chunk([3], 4, [5])])
    assert len(captured) == 4
