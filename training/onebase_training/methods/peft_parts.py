"""The parts that all of PEFT's methods share: putting its modules on the base, and writing its two files."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from onebase_adapters.errors import ConfigError
from onebase_adapters.formats.peft_folder import WEIGHTS_FILE
from onebase_contract.settings import TrainConfig
from onebase_engine.base.load_base import LoadedBase
from onebase_training.model.attached import Attached


@dataclass(frozen=True)
class PeftParts:
    """PEFT's model, and what of it `Attached` needs."""

    peft: Any
    model: PreTrainedModel
    save: Callable[[Path], None]
    load: Callable[[Mapping[str, torch.Tensor]], None]


def put_peft(base: LoadedBase, config: PeftConfig, *, rounded: tuple[str, ...] = ()) -> PeftParts:
    """Put a method's modules on the base. Tensors whose names hold one of `rounded` are written in bfloat16: those
    that each forward pass of training rounded to it, so that the adapter stays the same at half the size.

    Raises ConfigError where PEFT refuses, e.g. for target modules that the base lacks.
    """
    try:
        with warnings.catch_warnings():
            # Of a head that shares the embedding's weights. Ours are served apart, whichever is trained.
            warnings.filterwarnings("ignore", ".*tie_word_embeddings.*")
            warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)
            peft: Any = get_peft_model(base.model, config)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"PEFT refuses this: {error}") from error
    # Else PEFT names the cache folder that the base was read from.
    peft.peft_config["default"].base_model_name_or_path = base.shape.hub_id

    def save(folder: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            peft.save_pretrained(folder, save_embedding_layers=False)
        (folder / "README.md").unlink(missing_ok=True)
        rewrite(folder / WEIGHTS_FILE, rounded)

    def load(tensors: Mapping[str, torch.Tensor]) -> None:
        try:
            found = set_peft_model_state_dict(peft, dict(tensors))
        except (ValueError, RuntimeError, KeyError) as error:
            raise ConfigError(f"The adapter to start from does not fit: {error}", field="init_from") from error
        # PEFT takes a prompt's embeddings in, and calls them unexpected all the same.
        strangers = [name for name in found.unexpected_keys if name != "prompt_embeddings"]
        if strangers:
            raise ConfigError(
                f"The adapter to start from has what this run has no place for: {strangers[0]}.", field="init_from"
            )

    return PeftParts(peft, peft.get_base_model(), save, load)


def attach_peft(base: LoadedBase, config: PeftConfig, *, rounded: tuple[str, ...] = ()) -> Attached:
    """A method that lives in the base's modules. Raises ConfigError as `put_peft` does."""
    parts = put_peft(base, config, rounded=rounded)
    return Attached(parts.model, parts.save, parts.load)


def rewrite(weights: Path, rounded: tuple[str, ...], **added: torch.Tensor) -> None:
    """Round the named tensors of a safetensors file to bfloat16, and add others."""
    tensors = load_file(weights)
    for name, value in tensors.items():
        if any(part in name for part in rounded):
            tensors[name] = value.to(torch.bfloat16)
    save_file(tensors | added, weights, metadata={"format": "pt"})
    weights.chmod(0o644)


def target_modules(config: TrainConfig) -> list[str] | str:
    """In PEFT's words: the chosen ones, else all linear modules but the head."""
    return list(config.targets) or "all-linear"


def target_names(base: LoadedBase, config: TrainConfig) -> list[str]:
    """As `target_modules`, for methods that take no "all-linear"."""
    if config.targets:
        return list(config.targets)
    head = base.model.get_output_embeddings()
    return sorted(
        {name.rpartition(".")[2] for name in base.shape.sites if base.model.get_submodule(name) is not head}
    )


def is_transposed(base: LoadedBase) -> bool:
    """Whether the base's linear modules are GPT-2's Conv1D, whose weights lie the other way round."""
    return any(isinstance(module, Conv1D) for module in base.model.modules())


def task_type(base: LoadedBase) -> str:
    """Return PEFT's name for the base's kind."""
    if base.shape.encoder_decoder:
        return "SEQ_2_SEQ_LM"
    return "FEATURE_EXTRACTION" if base.shape.encoder else "CAUSAL_LM"
