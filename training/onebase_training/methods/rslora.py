"""rsLoRA (Kalajdzievski 2023): LoRA scaled by alpha / sqrt(rank), so that large ranks learn as they should."""

from onebase_contract.settings import TrainConfig
from onebase_engine.base.load_base import LoadedBase
from onebase_training.methods import lora
from onebase_training.model.attached import Attached


def attach(base: LoadedBase, config: TrainConfig, steps: int) -> Attached:
    """As LoRA; alpha is the rank's root times two by default, which makes the scale LoRA's."""
    rank = config.rank or lora.RANK
    config = config.resolved(alpha=2.0 * rank**0.5)
    return lora.attach_lora(base, config, use_rslora=True)
