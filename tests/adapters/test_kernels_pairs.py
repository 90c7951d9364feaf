"""The products that CPU kernels are made of: by the processor's own instruction and without it, in any tile."""

import numpy as np
import pytest
import torch
from numba import njit

from onebase_engine.kernels.cpu import pairs
from onebase_engine.kernels.cpu.target import Target
from support.batches import random_bf16
from support.targets import runnable

targets = pytest.mark.parametrize("target", runnable(), ids=lambda target: target.name)


@targets
@pytest.mark.parametrize("paired", [True, False])
def test_a_tile_is_a_product_in_any_number_of_rows(paired: bool, target: Target) -> None:
    a, b = random_bf16(1, 4, 26), random_bf16(2, 26, 32)
    laid_out = b.view(13, 2, 32).transpose(1, 2).contiguous() if paired else b
    found = {}
    for rows in (1, 4):
        tile = pairs.pair_tile(rows, 2, 4, paired=paired, target=target)

        @njit  # type: ignore[untyped-decorator]
        def run(c: int, a: int, b: int) -> None:
            tile(c, 32, a, 26, b, 64, 32, 13, 0)  # noqa: B023

        found[rows] = torch.empty(rows, 32)
        run(found[rows].data_ptr(), a.data_ptr(), laid_out.data_ptr())
    torch.testing.assert_close(found[4], a.float() @ b.float(), rtol=1e-5, atol=1e-5)
    assert torch.equal(found[1][0], found[4][0])


@targets
def test_an_odd_end_is_paired_with_itself_and_no_weight(target: Target) -> None:
    """As attention does where the row after the last one is another's, or not a number."""
    tile = pairs.pair_tile(4, 1, 1, paired=False, accumulate=True, target=target)

    @njit  # type: ignore[untyped-decorator]
    def run(c: int, a: int, b: int) -> None:
        tile(c, 16, a, 6, b, 32, 16, 2, 0)
        tile(c, 16, a + 8, 6, b + 128, 0, 0, 1, 0)

    a, b = random_bf16(1, 4, 6), random_bf16(2, 6, 16)
    a[:, 5] = 0
    b[5] = torch.nan
    c = torch.ones(4, 16)
    run(c.data_ptr(), a.data_ptr(), b.data_ptr())
    torch.testing.assert_close(c, 1 + a[:, :5].float() @ b[:5].float(), rtol=1e-5, atol=1e-5)


@targets
def test_rounding_is_torchs_own(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairs, "TARGET", target)

    @njit  # type: ignore[untyped-decorator]
    def narrow(target: int, source: int) -> None:
        pairs.narrow_rows(target, source, 96)

    @njit  # type: ignore[untyped-decorator]
    def add(target: int, change: int, scale: np.float32) -> None:
        pairs.add_scaled(target, change, scale, 96)

    values = torch.randn(96, generator=torch.Generator().manual_seed(3)) * 100
    values[:4] = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0])
    target = torch.empty(96, dtype=torch.bfloat16)
    narrow(target.data_ptr(), values.data_ptr())
    torch.testing.assert_close(target, values.bfloat16(), rtol=0, atol=0, equal_nan=True)
    expected = (target.float() + np.float32(0.3) * values).bfloat16()
    add(target.data_ptr(), values.data_ptr(), np.float32(0.3))
    torch.testing.assert_close(target, expected, rtol=0, atol=0, equal_nan=True)
