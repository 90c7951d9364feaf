"""A method put on a base, as the loop and the writer take it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import Cache, PreTrainedModel


@dataclass(frozen=True)
class ClassHead:
    """A linear classifier in place of the language model's head."""

    linear: nn.Linear
    """[classes, hidden]; its bias starts at zero."""
    kind: Literal["sequence", "token"]
    pooling: Literal["first", "last", "mean"]
    """The part of an example's hidden states that a sequence head reads."""
    classes: tuple[str, ...]


@dataclass(frozen=True)
class Attached:
    """The base model with a method's parameters on it."""

    model: PreTrainedModel
    """The base. Only the method's parameters in it take gradients."""
    save: Callable[[Path], None]
    """Writes `adapter_config.json` and `adapter_model.safetensors` into an existing folder."""
    load: Callable[[Mapping[str, torch.Tensor]], None] | None = None
    """Takes a stored adapter's tensors as the start. Raises ConfigError where they do not fit. None: it cannot."""
    extra: nn.Module | None = None
    """Parameters that are no part of `model`."""
    virtual: Callable[[], torch.Tensor] | None = None
    """Makes the embeddings [n, hidden] that go among the prompt's."""
    places: tuple[int, ...] = ()
    """Places of those n; see `onebase_adapters.primitives.virtual_tokens.Layout`."""
    prefix: Callable[[int], Cache] | None = None
    """Makes the keys and values in front of everything, for a batch of so many rows."""
    prefix_length: int = 0
    head: ClassHead | None = None
    penalty: Callable[[], torch.Tensor] | None = None
    """Added to the loss, once a step."""
    after_step: Callable[[int], None] | None = None
    """Called with the number of steps done, while gradients are still there."""
    state: Callable[[], dict[str, torch.Tensor]] | None = None
    """Gives what a checkpoint must hold beside the parameters; tensors that loading copies into."""
    notes: Mapping[str, Any] = field(default_factory=dict)
    """For `onebase.json`: what serving must know beside the two files."""
