"""The fused LoRA layer against PEFT's own."""

import copy
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from onebase_contract.settings import TrainConfig
from onebase_training.methods.fast_lora import speed_up

CONFIG = TrainConfig(data=Path("-"), output=Path("-"))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 9)
        self.second = nn.Linear(9, 5, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.second(torch.relu(self.first(x)))
        return out


def adapted(**options: object) -> nn.Module:
    torch.manual_seed(0)
    settings = LoraConfig(r=3, lora_alpha=7, target_modules=["first", "second"], init_lora_weights=False, **options)  # type: ignore[arg-type]
    model: nn.Module = get_peft_model(Net(), settings)
    return model


@pytest.mark.parametrize("rslora", [False, True])
def test_outputs_and_gradients_are_pefts(rslora: bool) -> None:
    usual = adapted(use_rslora=rslora)
    fast = copy.deepcopy(usual)
    assert speed_up(fast, CONFIG) == 2
    x = torch.randn(2, 4, 6)
    outputs = []
    for model in (usual, fast):
        mine = x.clone().requires_grad_()
        out = model(mine)
        out.square().sum().backward()
        trained = [value.grad for value in model.parameters() if value.requires_grad]
        outputs.append([out, mine.grad, *trained])
    assert len(outputs[0]) == 6
    for one, other in zip(*outputs, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("option", [{"lora_dropout": 0.5}, {"use_dora": True}])
def test_what_is_not_plain_keeps_pefts_layer(option: dict[str, object]) -> None:
    assert speed_up(adapted(**option), CONFIG) == 0


def test_a_disabled_adapter_changes_nothing() -> None:
    model = adapted()
    speed_up(model, CONFIG)
    x = torch.randn(3, 6)
    with model.disable_adapter():  # type: ignore[operator]
        plain = model(x)
    assert not torch.allclose(plain, model(x))
    torch.testing.assert_close(
        plain, model.get_base_model().second.base_layer(torch.relu(model.get_base_model().first.base_layer(x)))
    )  # type: ignore[operator, union-attr]
