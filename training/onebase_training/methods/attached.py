"""A method put on a base, as the loop and the writer take it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel


@dataclass(frozen=True)
class Attached:
    """The base model with a method's parameters on it."""

    model: PreTrainedModel
    """The base. Only the method's parameters in it take gradients."""
    save: Callable[[Path], None]
    """Writes `adapter_config.json` and `adapter_model.safetensors` into an existing folder."""
