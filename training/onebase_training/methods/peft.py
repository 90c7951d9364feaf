"""What all of PEFT's methods share: putting its modules on the base, and writing its two files."""

import warnings
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, get_peft_model
from safetensors.torch import load_file, save_file

from onebase_adapters.base import LoadedBase
from onebase_adapters.errors import ConfigError
from onebase_adapters.files import WEIGHTS_FILE
from onebase_training.methods.attached import Attached


def attach_peft(base: LoadedBase, config: PeftConfig) -> Attached:
    """Raises ConfigError where PEFT refuses, e.g. for target modules that the base lacks."""
    try:
        peft: Any = get_peft_model(base.model, config)
    except ValueError as error:
        raise ConfigError(f"PEFT refuses this: {error}") from error
    # Else PEFT names the cache folder that the base was read from.
    peft.peft_config["default"].base_model_name_or_path = base.shape.name

    def save(folder: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            peft.save_pretrained(folder, save_embedding_layers=False)
        (folder / "README.md").unlink(missing_ok=True)
        _halve(folder / WEIGHTS_FILE)

    return Attached(peft.get_base_model(), save)


def _halve(weights: Path) -> None:
    """To bfloat16: what every forward pass of training rounded them to, so the adapter stays the same."""
    tensors = {name: value.to(torch.bfloat16) for name, value in load_file(weights).items()}
    save_file(tensors, weights, metadata={"format": "pt"})
    weights.chmod(0o644)
