"""P-tuning (Liu et al. 2021, "GPT Understands, Too"): embeddings among the prompt's tokens, made by a small LSTM or
MLP while training. What is written is what the encoder gave."""

from typing import Any

import torch
from peft import PromptEncoderConfig

from onebase_adapters.errors import ConfigError
from onebase_contract.settings import TrainConfig
from onebase_engine.base.load_base import LoadedBase
from onebase_training.methods.peft_parts import put_peft, task_type
from onebase_training.model.attached import Attached

LEARNING_RATE = 3e-3
"""Measured, see docs/decisions/0044."""


def attach(base: LoadedBase, config: TrainConfig, steps: int) -> Attached:
    """As many tokens as there are `places`, else `prompt_length` in front."""
    if config.encoder == "none":
        raise ConfigError("p-tuning without an encoder is prompt-tuning.", field="encoder")
    places = config.places or (0,) * config.prompt_length
    settings = PromptEncoderConfig(
        num_virtual_tokens=len(places),
        encoder_reparameterization_type=(config.encoder or "lstm").upper(),
        encoder_hidden_size=config.encoder_size or base.shape.hidden,
        encoder_num_layers=2,
        task_type=task_type(base),
    )
    parts = put_peft(base, settings, rounded=("prompt_embeddings",))
    encoder: Any = parts.peft.prompt_encoder["default"]
    # PEFT begins with noise of spread 1 behind the encoder; embeddings' own spread is far smaller.
    spread = float(base.model.get_input_embeddings().weight.float().std())
    encoder.embedding.weight.data.mul_(spread)

    def virtual() -> torch.Tensor:
        # In float32: it is small, and only few processors have an LSTM in bfloat16.
        with torch.autocast(base.device.type, enabled=False):
            made: torch.Tensor = parts.peft.get_prompt(1)[0]
            return made

    return Attached(
        base.model,
        parts.save,
        extra=parts.peft.prompt_encoder,
        virtual=virtual,
        places=places,
        notes={"places": list(places)} if config.places else {},
    )
