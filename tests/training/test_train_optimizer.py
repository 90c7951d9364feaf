"""Which optimiser a run takes: paged ones, whose moments may move to the host, for 4-bit bases on GPUs."""

from pathlib import Path

import pytest
import torch
from bitsandbytes.optim import AdamW as PagedAdamW
from transformers import Trainer

from onebase_contract.settings import TrainConfig
from onebase_training.fitting.training_loop import training_arguments


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
def test_the_optimiser(method: str, device: str, options: dict[str, bool], paged: bool, tmp_path: Path) -> None:
    config = TrainConfig(data=tmp_path, output=tmp_path, method=method, learning_rate=1e-3, **options)
    arguments = training_arguments(config, tmp_path, 10, torch.device(device))
    kind, settings = Trainer.get_optimizer_cls_and_kwargs(arguments)
    if paged:
        assert kind is PagedAdamW
        assert settings["is_paged"] and settings["optim_bits"] == 32
    else:
        assert kind is torch.optim.AdamW
        assert settings["fused"]
