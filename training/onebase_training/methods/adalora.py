"""AdaLoRA (Zhang et al. 2023): an update P diag(E) Q, whose rank goes to the modules that need it by pruning E."""

from pathlib import Path
from typing import Any

import torch
from peft import AdaLoraConfig

from onebase_adapters.errors import ConfigError
from onebase_contract.settings import TrainConfig
from onebase_engine.base.load_base import LoadedBase
from onebase_training.methods.peft_parts import is_transposed, put_peft, target_modules, task_type
from onebase_training.model.attached import Attached

LEARNING_RATE = 5e-3
"""Measured, see docs/decisions/0044: E begins at zero, and moves the update only by its product with P and Q."""
RANK = 8
"""On average, at the end; it begins with half as much again, as in the paper's experiments."""


def attach(base: LoadedBase, config: TrainConfig, steps: int) -> Attached:
    """Pruning starts after a tenth of the steps; the last third trains with the final ranks."""
    rank = config.rank or RANK
    warm, last = steps // 10, steps // 3
    if warm >= steps - last:
        raise ConfigError(f"adalora needs more than {steps} steps.", field="epochs")
    settings = AdaLoraConfig(
        init_r=rank + (rank + 1) // 2,
        target_r=rank,
        tinit=warm,
        tfinal=last,
        deltaT=max(1, steps // 100),
        total_step=steps,
        lora_alpha=2.0 * rank if config.alpha is None else config.alpha,
        lora_dropout=config.dropout,
        target_modules=target_modules(base, config),
        modules_to_save=list(config.modules_to_save) or None,
        fan_in_fan_out=is_transposed(base),
        task_type=task_type(base),
    )
    parts = put_peft(base, settings)
    tuner, allocator = parts.peft.base_model, parts.peft.base_model.rankallocator
    histories = {"ipt": allocator.ipt, "mean": allocator.exp_avg_ipt, "spread": allocator.exp_avg_unc}
    for name, value in tuner.model.named_parameters():
        if "lora_" in name and value.requires_grad:
            for history in histories.values():
                history[name] = torch.zeros_like(value)

    def state() -> dict[str, torch.Tensor]:
        return {f"{kind}.{name}": value for kind, of in histories.items() for name, value in of.items()}

    def save(folder: Path) -> None:
        # Full-rank tensors: what is written may be an earlier checkpoint, of other ranks. Pruned entries are zero.
        settings.rank_pattern = None
        parts.save(folder)

    return Attached(
        parts.model,
        save,
        penalty=lambda: _orthogonality(parts.model) * settings.orth_reg_weight,
        after_step=tuner.update_and_allocate,
        state=state,
    )


def _orthogonality(model: Any) -> torch.Tensor:
    """How far P and Q are from orthogonal, on average (equation 4)."""
    gaps = []
    for name, value in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            product = value @ value.T if "lora_A" in name else value.T @ value
            gaps.append(torch.linalg.norm(product - torch.eye(len(product), device=value.device)))
    return torch.stack(gaps).mean()
