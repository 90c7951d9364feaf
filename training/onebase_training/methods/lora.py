"""LoRA (Hu et al. 2021) and QLoRA (Dettmers et al. 2023), which is LoRA on a 4-bit base."""

from peft import LoraConfig
from transformers.pytorch_utils import Conv1D

from onebase_adapters.base import LoadedBase
from onebase_training.config import TrainConfig
from onebase_training.fast_lora import speed_up
from onebase_training.methods.attached import Attached
from onebase_training.methods.peft import attach_peft

LEARNING_RATE = 1e-3


def attach(base: LoadedBase, config: TrainConfig) -> Attached:
    """Low-rank updates on the chosen linear modules, float32, B at zero."""
    alpha = 2.0 * config.rank if config.alpha is None else config.alpha
    settings = LoraConfig(
        r=config.rank,
        lora_alpha=alpha,
        lora_dropout=config.dropout,
        target_modules=list(config.targets) or "all-linear",
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in base.model.modules()),
        task_type="CAUSAL_LM",
    )
    attached = attach_peft(base, settings)
    speed_up(attached.model)
    return attached
