"""Classifiers on labels and tags: which classes there are, and a linear head on top of any method."""

from dataclasses import replace
from pathlib import Path
from typing import Literal

from torch import nn

from onebase_adapters.errors import ConfigError
from onebase_adapters.formats.peft_folder import WEIGHTS_FILE
from onebase_contract.settings import TrainConfig
from onebase_engine.base.load_base import LoadedBase
from onebase_training.data import Dataset
from onebase_training.data.task_kind import classes_of
from onebase_training.methods.peft_parts import rewrite
from onebase_training.model.attached import Attached, ClassHead

LEARNING_RATE = 3e-3
"""Measured, see docs/decisions/0055. Its inputs are hidden states, some of them large (SmolLM2's reach 48).
So it takes far less than a prefix does."""
_SPREAD = 1e-3
"""Spread of its first weights. The usual 0.02 would let those large inputs decide, at random."""


def with_head(attached: Attached, base: LoadedBase, dataset: Dataset, config: TrainConfig) -> Attached:
    """`attached` with a classifier, float32, which is written beside its tensors."""
    classes = classes_of(dataset)
    kind: Literal["sequence", "token"] = "token" if dataset.examples[0].words else "sequence"
    pooling = config.pooling or ("mean" if base.shape.encoder else "last")
    if pooling != "last" and not base.shape.encoder:
        raise ConfigError("A decoder's classifier reads the last token, which alone has seen all.", field="pooling")
    linear = nn.Linear(base.shape.hidden, len(classes), device=base.device)
    nn.init.normal_(linear.weight, std=_SPREAD)
    nn.init.zeros_(linear.bias)

    def save(folder: Path) -> None:
        attached.save(folder)
        tensors = {f"score.{name}": value.detach().cpu() for name, value in linear.state_dict().items()}
        rewrite(folder / WEIGHTS_FILE, (), **tensors)

    head = {"kind": kind, "pooling": pooling, "labels": list(classes)}
    return replace(
        attached,
        save=save,
        head=ClassHead(linear, kind, pooling, classes),
        notes={**attached.notes, "head": head},
    )
