"""Products of factors as other factors."""

import torch

from onebase_adapters.factorise import refactorise


def test_products_that_nearly_cancel_keep_their_difference_in_bfloat16() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(8, 96), torch.randn(64, 8)
    moved = 1e-3 * torch.randn(8, 96), 1e-3 * torch.randn(64, 8)
    both_a, both_b = torch.cat([a + moved[0], a]), torch.cat([b + moved[1], -b], 1)
    change = (both_b.double() @ both_a.double()).float()

    def error(a: torch.Tensor, b: torch.Tensor) -> float:
        product = b.to(torch.bfloat16).float() @ a.to(torch.bfloat16).float()
        return float((product - change).norm() / change.norm())

    new_a, new_b = refactorise(both_a, both_b)
    assert (new_a.shape, new_b.shape) == (both_a.shape, both_b.shape)
    assert error(new_a, new_b) < 0.005
    assert error(both_a, both_b) > 0.5
