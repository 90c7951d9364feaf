"""The product with bfloat16 weights where torch would emulate it: against float64, a row alone and in company."""

import pytest
import torch
from torch import nn

from onebase_engine.kernels.cpu.plain_product import PlainProduct


@pytest.mark.parametrize(("features", "width", "bias"), [(1, 8, False), (45, 64, True), (96, 576, False)])
def test_it_is_the_product_rounded_once(features: int, width: int, bias: bool) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(width, features, bias=bias, dtype=torch.bfloat16).requires_grad_(False)
    x = torch.randn(2, 5, width, dtype=torch.bfloat16)
    made = PlainProduct(linear)(x)
    exact = nn.functional.linear(x.double(), linear.weight.double(), linear.bias.double() if bias else None)
    assert made.shape == exact.shape and made.dtype == torch.bfloat16
    torch.testing.assert_close(made.double(), exact, rtol=2**-8, atol=1e-4)


def test_a_row_does_not_depend_on_its_company() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(576, 70, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    x = torch.randn(19, 576, dtype=torch.bfloat16)
    product = PlainProduct(linear)
    together = product(x)
    assert all(torch.equal(product(x[row]), together[row]) for row in range(len(x)))
