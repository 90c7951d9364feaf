"""Prefix tuning (Li and Liang 2021) and P-tuning v2 (Liu et al. 2022), which is the same with a classifier on top:
learned keys and values in front of every layer."""

from typing import Any

from peft import PrefixTuningConfig

from onebase_adapters.base import LoadedBase
from onebase_adapters.errors import ConfigError
from onebase_training.config import TrainConfig
from onebase_training.methods.attached import Attached
from onebase_training.methods.peft_parts import put_peft, task_type

LEARNING_RATE = 3e-2
"""Measured, see DECISIONS.md: keys and values themselves are trained, and take far more than weights do."""


def attach(base: LoadedBase, config: TrainConfig, steps: int) -> Attached:
    """`prompt_length` keys and values a layer, float32; made by an MLP while training if `encoder` is `mlp`."""
    if config.encoder == "lstm":
        raise ConfigError("A prefix is made by an mlp, or by none.", field="encoder")
    if config.checkpointing == "always":
        raise ConfigError(
            "Recomputing activations drops a prefix: use --checkpointing never.", field="checkpointing"
        )
    settings = PrefixTuningConfig(
        num_virtual_tokens=config.prompt_length,
        prefix_projection=config.encoder == "mlp",
        encoder_hidden_size=config.encoder_size or base.shape.hidden,
        task_type=task_type(base),
    )
    parts = put_peft(base, settings, rounded=("prompt_embeddings",))
    encoder: Any = parts.peft.prompt_encoder["default"]
    if config.encoder != "mlp":
        encoder.embedding.weight.data.mul_(_SPREAD)
    return Attached(
        base.model,
        parts.save,
        parts.load,
        extra=parts.peft.prompt_encoder,
        prefix=lambda rows: parts.peft.get_prompt(rows),
        prefix_length=config.prompt_length,
    )


_SPREAD = 0.1
"""Of the first keys and values. PEFT's 1 disturbs the base so much that training must first undo it."""
