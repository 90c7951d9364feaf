"""The packed 4-bit product and the screened head on CPUs: exact where they promise it, row by row."""

import numpy as np
import pytest
import torch
from bitsandbytes.nn import Linear4bit
from hypothesis import given
from hypothesis import strategies as st

from onebase_engine.kernels.cpu import screen as screen_module
from onebase_engine.kernels.cpu.noise import add_gumbel, add_gumbel_of
from onebase_engine.kernels.cpu.packed import PackedLinear, packable
from onebase_engine.kernels.cpu.screen import UNSURE, Screen, best_tokens
from onebase_engine.kernels.cpu.target import TARGET
from onebase_engine.kernels.gumbel_noise import Noise, gumbel
from onebase_engine.runner.lm_head import HiddenScores
from support.batches import random_bf16


def make_linear(
    in_features: int, out_features: int, seed: int = 1, quant_type: str = "nf4", *, bias: bool = False
) -> Linear4bit:
    linear = Linear4bit(
        in_features, out_features, bias=bias, compute_dtype=torch.bfloat16, quant_type=quant_type
    )  # fmt: skip
    linear.weight.data = random_bf16(seed, out_features, in_features, scale=in_features**-0.5)
    if bias:
        linear.bias.data = random_bf16(seed + 100, out_features)
    return linear.to("cpu").eval()


def make_head(vocab: int, width: int, seed: int = 1) -> torch.nn.Linear:
    head = torch.nn.Linear(width, vocab, bias=False, dtype=torch.bfloat16)
    head.weight.data = random_bf16(seed, vocab, width, scale=width**-0.5)
    return head.requires_grad_(False)


packs = pytest.mark.skipif(not packable(make_linear(64, 32)), reason="needs AVX2 and FMA, or NEON")


def product(linear: PackedLinear, x: torch.Tensor) -> torch.Tensor:
    out = torch.empty(len(x), linear.out_features, dtype=torch.bfloat16)
    linear(x.data_ptr(), out.data_ptr(), len(x))
    return out


@packs
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("rows", [1, 2, 7, 21, 300])
@torch.inference_mode()
def test_a_joined_product_is_bitsandbytes_own(rows: int, quant_type: str) -> None:
    sizes = [32, 96, 64]
    modules = [make_linear(128, size, seed, quant_type, bias=seed > 0) for seed, size in enumerate(sizes)]
    x = random_bf16(9, rows, 128)
    apart = torch.cat([module(x) for module in modules], 1)
    joined = PackedLinear(modules)
    # Without the processor's product of pairs, ours and bitsandbytes' make their sums in another order.
    limit = 0 if TARGET.pairs else 2**-6
    torch.testing.assert_close(product(joined, x), apart, rtol=limit, atol=limit)
    # The modules still work, on views of the joined weight.
    torch.testing.assert_close(torch.cat([module(x) for module in modules], 1), apart, rtol=limit, atol=limit)
    first = joined.weight.data_ptr()
    assert [module.weight.data.data_ptr() - first for module in modules] == [0, 32 * 64, 128 * 64]


@packs
def test_a_packed_row_is_the_same_in_any_number_of_rows() -> None:
    linear = PackedLinear([make_linear(192, 160)])
    x = random_bf16(3, 300, 192)
    whole = product(linear, x)
    for rows in (1, 2, 3, 4, 7, 8, 15, 16, 17, 31, 33, 64, 127, 255):
        for start in (0, 300 - rows):
            assert torch.equal(product(linear, x[start : start + rows].contiguous()), whole[start : start + rows])


@packs
def test_odd_sizes_are_not_taken_for_packable() -> None:
    assert not packable(make_linear(64, 40))
    assert not packable(make_linear(96, 32))
    assert not packable(make_head(32, 64))


@packs
@given(vocab=st.integers(1, 20).map(lambda n: 32 * n), rows=st.integers(1, 6), seed=st.integers(0, 99))
def test_the_screen_finds_the_best_of_all_logits(vocab: int, rows: int, seed: int) -> None:
    head = make_head(vocab, 64, seed)
    hidden = random_bf16(seed + 1, rows, 64)
    screened = Screen(head).best(hidden)
    exact = hidden.float() @ head.weight.float().t()
    for row, token in enumerate(screened):
        # Sums in another order decide only between those that differ by less than float32 can tell.
        assert exact[row, token] >= exact[row].max() - 1e-5
        assert Screen(head).best(hidden[row : row + 1].contiguous()) == [token]


@packs
def test_the_screen_gives_the_first_of_equals_and_refuses_what_is_not_finite() -> None:
    head = make_head(64, 64)
    head.weight.data[40] = head.weight.data[7]
    hidden = torch.stack([3 * head.weight.data[7]] * 4)
    hidden[1, 3] = torch.nan
    hidden[2, 5] = torch.inf
    assert Screen(head).best(hidden) == [7, -1, -1, 7]


@packs
def test_scores_of_some_rows_are_those_of_all() -> None:
    head = make_head(96, 64)
    scores = HiddenScores(random_bf16(4, 6, 64), head, Screen(head))
    plain = HiddenScores(random_bf16(4, 6, 64), head, None)
    best = plain.best(range(6))
    assert scores.best(range(6)) == best
    assert scores.best([4, 1]) == [best[4], best[1]]
    everything = plain.logits(range(6))
    torch.testing.assert_close(scores.logits([5, 0]), everything[[5, 0]])


@packs
@given(
    vocab=st.integers(1, 20).map(lambda n: 32 * n),
    seed=st.integers(0, 99),
    temperature=st.sampled_from([0.3, 1.0, 5.0]),
)
def test_the_screen_draws_what_all_logits_would(vocab: int, seed: int, temperature: float) -> None:
    head, hidden = make_head(vocab, 64, seed), 4 * random_bf16(seed + 1, 3, 64)
    noise = Noise.of([temperature, 0.0, temperature], [seed, 0, 2**63 + seed])
    noisy = noise.over(hidden.float() @ head.weight.float().t())
    for row, token in enumerate(Screen(head).best(hidden, noise)):
        assert noisy[row, token] >= noisy[row].max() - 1e-4


@packs
def test_a_row_that_the_screen_leaves_too_many_of_is_scored_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that are all alike within the screen's error, beside a row that is sure; greedy and drawn."""
    head = make_head(4096, 64)
    common = random_bf16(5, 1, 64)[0]
    head.weight.data = common + 0.02 * head.weight.data
    head.weight.data[1] = 3 * common
    hidden = torch.stack([-common, 3 * common, 0.05 * random_bf16(6, 1, 64)[0] - common])
    noise = Noise.of([0.0, 0.0, 0.1], [0, 0, 7])
    screen = Screen(head)
    exact = noise.over(hidden.float() @ head.weight.float().t())
    found = screen.best(hidden, noise)
    assert found[1] == 1
    for row, token in enumerate(found):
        assert exact[row, token] >= exact[row].max() - 1e-5
    settled = []
    monkeypatch.setattr(screen_module, "settle_unsure", lambda *arguments: settled.append(arguments[-1].copy()))
    screen.best(hidden, noise)
    assert (settled[0] == UNSURE).tolist() == [True, False, True], "the case that is meant"


def test_noise_is_its_definition_and_follows_gumbels_law() -> None:
    seeds = np.array([0, 1, 2**40 + 3, 2**64 - 1], np.uint64)
    right = gumbel(seeds, torch.arange(30_000)[None])
    found = torch.zeros_like(right)
    for row, seed in enumerate(seeds):
        add_gumbel(found[row].numpy(), seed)
    torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-5)
    assert len(set(found[:, 0].tolist())) == len(seeds)
    some = torch.tensor([29_999, 5, 17])
    apart = torch.zeros(3)
    add_gumbel_of(apart.numpy(), some.numpy(), seeds[2])
    assert torch.equal(apart, found[2, some])
    # Kolmogorov and Smirnov's test at one in ten thousand.
    uniform = np.sort(np.exp(-np.exp(-found.double().numpy().ravel())))
    assert np.abs(uniform - np.arange(len(uniform)) / len(uniform)).max() < 2.23 / np.sqrt(len(uniform))
    neighbours = np.corrcoef(found[:, :-1].ravel(), found[:, 1:].ravel())[0, 1]
    assert abs(neighbours) < 4 / np.sqrt(found.numel())


@given(vocab=st.integers(1, 300), seed=st.integers(0, 99))
def test_a_margin_that_covers_the_error_never_loses_the_best(vocab: int, seed: int) -> None:
    """The kernel alone, with errors drawn up to the margins that it is told."""
    hidden, weight = random_bf16(seed, 1, 32), random_bf16(seed + 1, vocab, 32)
    exact = (hidden.float() @ weight.float().t())[0]
    margins = torch.rand(vocab, generator=torch.Generator().manual_seed(seed)) * 0.3
    error = (
        (torch.rand(vocab, generator=torch.Generator().manual_seed(seed + 1)) * 2 - 1)
        * margins
        * hidden.float().norm()
    )
    approx = (exact + error).bfloat16()
    tokens = np.empty(1, np.int64)
    best_tokens(
        hidden.data_ptr(), approx.data_ptr(), weight.data_ptr(), margins.numpy(), 1, 32,
        np.zeros(1, np.float32), np.zeros(1, np.uint64), tokens,
    )  # fmt: skip
    assert exact[tokens[0]] >= exact.max() - 1e-5
