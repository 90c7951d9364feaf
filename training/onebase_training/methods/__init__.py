"""The methods by their names: one file each, one line here."""

from collections.abc import Callable
from dataclasses import dataclass

from onebase_adapters.base import LoadedBase
from onebase_adapters.base.spec import Quantization
from onebase_adapters.errors import ConfigError
from onebase_training.config import TrainConfig
from onebase_training.methods import lora
from onebase_training.methods.attached import Attached


@dataclass(frozen=True)
class Method:
    """How a method is trained."""

    about: str
    quantization: Quantization
    """Of the base while it trains."""
    learning_rate: float
    """The default; its source stands in the method's file."""
    attach: Callable[[LoadedBase, TrainConfig], Attached]


METHODS: dict[str, Method] = {
    "qlora": Method("low-rank updates on the 4-bit base", "nf4", lora.LEARNING_RATE, lora.attach),
    "lora": Method("low-rank updates on the bfloat16 base", "none", lora.LEARNING_RATE, lora.attach),
}


def find_method(name: str) -> Method:
    """Raises ConfigError."""
    if name not in METHODS:
        raise ConfigError(f"No method {name!r}; there are {', '.join(METHODS)}.", field="method")
    return METHODS[name]
