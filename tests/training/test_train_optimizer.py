"""Which optimiser a run takes, what decays, and how fast each part learns."""

from pathlib import Path

import pytest
import torch
from torch import nn

from onebase_contract.settings import TrainConfig
from onebase_training.fitting.optimizer import is_paged, make_optimizer, make_schedule


@pytest.mark.parametrize(
    ("method", "device", "options", "paged"),
    [
        ("qlora", "cuda", {}, True),
        ("prompt-tuning", "cuda", {}, True),
        ("lora", "cuda", {}, False),
        ("full", "cuda", {}, False),
        ("qlora", "cuda", {"fsdp": True}, False),
        ("qlora", "cpu", {}, False),
    ],
)
def test_moments_of_a_4_bit_base_may_leave_the_gpu(
    method: str, device: str, options: dict[str, bool], paged: bool, tmp_path: Path
) -> None:
    config = TrainConfig(data=tmp_path, output=tmp_path, method=method, learning_rate=1e-3, **options)
    assert is_paged(config, torch.device(device)) == paged


class Learner(nn.Module):
    """A layer under a classifier, and something frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head, self.frozen = nn.Linear(4, 4), nn.Linear(4, 2), nn.Linear(4, 4)
        self.frozen.requires_grad_(False)
        self.device = torch.device("cpu")


def test_a_classifier_has_its_own_rate_and_vectors_do_not_decay(tmp_path: Path) -> None:
    config = TrainConfig(
        data=tmp_path, output=tmp_path, learning_rate=1e-3, head_learning_rate=1e-2, weight_decay=0.1, warmup=0.5
    )
    learner = Learner()
    optimizer = make_optimizer(learner, config)
    found = {
        id(value): (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for value in group["params"]
    }
    assert found == {
        id(learner.layer.weight): (1e-3, 0.1),
        id(learner.layer.bias): (1e-3, 0.0),
        id(learner.head.weight): (1e-2, 0.1),
        id(learner.head.bias): (1e-2, 0.0),
    }
    schedule = make_schedule(optimizer, config, 4)
    rates = []
    for _ in range(4):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[:3] == [0.0, pytest.approx(5e-4), pytest.approx(1e-3)]
    assert rates[3] < 1e-3
