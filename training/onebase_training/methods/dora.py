"""DoRA (Liu et al. 2024): LoRA for a weight's direction, and a trained magnitude for each of its rows."""

from onebase_contract.settings import TrainConfig
from onebase_engine.base.load_base import LoadedBase
from onebase_training.methods import lora
from onebase_training.methods.peft_parts import attach_peft
from onebase_training.model.attached import Attached

LEARNING_RATE = lora.LEARNING_RATE


def attach(base: LoadedBase, config: TrainConfig, steps: int) -> Attached:
    """As LoRA, with magnitudes in float32."""
    return attach_peft(base, lora.lora_config(base, config, use_dora=True), rounded=lora.ROUNDED)
