"""AdamW over what is trained, and the learning rate's way through a run."""

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from onebase_contract.settings import TrainConfig
from onebase_training.methods.attach import find_method
from onebase_training.model.trained_model import Trained

_NAMES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}


def make_optimizer(model: Trained, config: TrainConfig) -> torch.optim.Optimizer:
    """Matrices decay, vectors do not, and a classifier has a learning rate of its own."""
    head = {id(value) for value in model.head.parameters()} if model.head else set()
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for value in model.parameters():
        if value.requires_grad:
            groups.setdefault((id(value) in head, value.ndim > 1), []).append(value)
    rates = {False: config.learning_rate or 0.0, True: config.head_learning_rate}
    described = [
        {"params": values, "lr": rates[of_head], "weight_decay": config.weight_decay if decays else 0.0}
        for (of_head, decays), values in groups.items()
    ]
    if is_paged(config, model.device):
        from onebase_engine.kernels.bitsandbytes_import import PagedAdamW32bit

        paged: torch.optim.Optimizer = PagedAdamW32bit(described)
        return paged
    return torch.optim.AdamW(described, fused=True)


def is_paged(config: TrainConfig, device: torch.device) -> bool:
    """Whether moments may move to the host (QLoRA, section 3): on GPUs with a 4-bit base."""
    return device.type == "cuda" and find_method(config.method).quantization != "none" and not config.spread


def make_schedule(optimizer: torch.optim.Optimizer, config: TrainConfig, steps: int) -> LambdaLR:
    """The factor on each group's learning rate, which rises over the warm-up and then follows the schedule."""
    schedule: LambdaLR = get_scheduler(
        _NAMES[config.schedule],
        optimizer,
        num_warmup_steps=round(config.warmup * steps),
        num_training_steps=steps,
    )
    return schedule
