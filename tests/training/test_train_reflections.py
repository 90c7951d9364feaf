"""HRA's reflections on the activations, against PEFT's matrices."""

import peft
import pytest
import torch
from torch import nn

from onebase_training.methods.hra import _Forward


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_outputs_and_gradients_are_pefts(rank: int) -> None:
    torch.manual_seed(rank)
    model = nn.Sequential(nn.Linear(16, 12))
    made = peft.get_peft_model(model, peft.HRAConfig(r=rank, target_modules=["0"], init_weights=False))
    layer = made.base_model.model[0]
    x = torch.randn(5, 16, requires_grad=True)
    ours = _Forward(layer)
    outputs = [ours(x), layer(x)]
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
    weights = torch.randn(5, 12)
    found, wanted = (torch.autograd.grad((out * weights).sum(), (x, layer.hra_u["default"])) for out in outputs)
    for mine, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-4)
