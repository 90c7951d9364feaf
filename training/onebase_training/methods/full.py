"""Full fine-tuning: all weights are trained, and a whole model is written, for `onebase serve --model`."""

from pathlib import Path

import torch

from onebase_adapters.errors import ConfigError
from onebase_contract.settings import TrainConfig
from onebase_engine.base.load_base import LoadedBase, plain_attention, quiet_loading
from onebase_engine.base.mixture import is_mixture
from onebase_training.model.attached import Attached

LEARNING_RATE = 1e-4
"""Measured, see docs/decisions/0044. Larger bases want less: 2e-5 is usual for 7B (LLaMA 2, section 3.1)."""


def attach(base: LoadedBase, config: TrainConfig, steps: int) -> Attached:
    """Trained weights are float32, products run in bfloat16, and bfloat16 is written."""
    if is_mixture(base.model.config):
        raise ConfigError("A mixture of experts is not trained whole here: take lora or qlora.", field="method")
    model = base.model.float()
    model.requires_grad_(True)

    def save(folder: Path) -> None:
        kept = model.config._attn_implementation
        model.set_attn_implementation(plain_attention(model))
        rounded = {name: value.to(torch.bfloat16) for name, value in model.state_dict().items()}
        with quiet_loading():
            model.save_pretrained(folder, state_dict=rounded)
        model.set_attn_implementation(kept)
        base.tokenizer.save_pretrained(folder)

    return Attached(model, save)
