"""IA3 (Liu et al. 2022, "Few-Shot Parameter-Efficient Fine-Tuning Is Better..."): keys, values and the MLP's inner
activations are each multiplied by a trained vector."""

from peft import IA3Config
from peft.utils.constants import (
    TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING,
    TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING,
)

from onebase_adapters.errors import ConfigError
from onebase_contract.settings import TrainConfig
from onebase_engine.base.load_base import LoadedBase
from onebase_training.methods.peft_parts import attach_peft, is_transposed, task_type
from onebase_training.model.attached import Attached

LEARNING_RATE = 3e-2
"""Measured, see docs/decisions/0044. The paper has 3e-3, with Adafactor and 1000 steps."""

_OF_INPUTS = ("down_proj", "fc2", "dense_4h_to_h", "wo")
"""Names of the MLP's last linear module in various architectures; there the input is scaled."""


def attach(base: LoadedBase, config: TrainConfig, steps: int) -> Attached:
    """Vectors of ones, float32: the base as it is."""
    kind = base.shape.model_type
    targets, inputs = list(config.targets), [name for name in config.targets if name in _OF_INPUTS]
    if not targets:
        if kind not in TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING:
            raise ConfigError(f"Name the modules that ia3 scales in a {kind} with --targets.", field="targets")
        targets = TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING[kind]
        inputs = TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING[kind]
    settings = IA3Config(
        target_modules=targets,
        feedforward_modules=inputs,
        modules_to_save=list(config.modules_to_save) or None,
        fan_in_fan_out=is_transposed(base),
        task_type=task_type(base),
    )
    return attach_peft(base, settings)
