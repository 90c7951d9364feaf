"""The parts that all of PEFT's methods share: putting its modules on the base, and writing its two files."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from peft import PeftConfig, get_peft_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import transformers_weight_conversion as conversion
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from onebase_adapters.errors import ConfigError
from onebase_adapters.formats.peft_folder import WEIGHTS_FILE
from onebase_contract.settings import TrainConfig
from onebase_engine.base.load_base import LoadedBase
from onebase_engine.base.mixture import Mixture, is_mixture
from onebase_training.model.attached import Attached


@dataclass(frozen=True)
class PeftParts:
    """PEFT's model, and what of it `Attached` needs."""

    peft: Any
    model: PreTrainedModel
    save: Callable[[Path], None]
    load: Callable[[Mapping[str, torch.Tensor]], None]


BASE_PREFIX = "base_model.model."
"""Of all names in what PEFT saves."""


def put_peft(
    base: LoadedBase, config: PeftConfig, *, rounded: tuple[str, ...] = (), routed: bool = False
) -> PeftParts:
    """Put a method's modules on the base. Tensors whose names hold one of `rounded` are written in bfloat16: those
    that each forward pass of training rounded to it, so that the adapter stays the same at half the size.
    `routed`: it may be put on a mixture's router and experts.

    Raises ConfigError where PEFT refuses, e.g. for target modules that the base lacks.
    """
    try:
        with _modules_as_they_are(), warnings.catch_warnings():
            # Of a head that shares the embedding's weights. Ours are served apart, whichever is trained.
            warnings.filterwarnings("ignore", ".*tie_word_embeddings.*")
            warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)
            peft: Any = get_peft_model(base.model, config)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"PEFT refuses this: {error}") from error
    if not routed:
        _refuse_routed(base, config)
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
            with _modules_as_they_are():
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


@contextmanager
def _modules_as_they_are() -> Iterator[None]:
    """Let PEFT not take a mixture's linear modules for those of transformers 4, which it would look for in stacked
    parameters that are not there."""
    with (
        patch.object(conversion, "convert_peft_config_for_transformers", lambda *_, **__: None),
        patch.object(
            conversion, "convert_peft_adapter_state_dict_for_transformers",
            lambda *_, adapter_state_dict, **__: adapter_state_dict,
        ),
    ):  # fmt: skip
        yield


def _refuse_routed(base: LoadedBase, config: PeftConfig) -> None:
    """What PEFT cannot put on transformers' stacked experts would be an adapter that it cannot read."""
    for mixture in (module for module in base.model.modules() if isinstance(module, Mixture)):
        if any(isinstance(module, BaseTunerLayer) for module in mixture.modules()):
            raise ConfigError(
                f"PEFT's {config.peft_type} has no form for a mixture's router and experts: choose --targets in "
                "attention, or lora or qlora.",
                field="targets",
            )


def attach_peft(
    base: LoadedBase, config: PeftConfig, *, rounded: tuple[str, ...] = (), routed: bool = False
) -> Attached:
    """A method that lives in the base's modules. Raises ConfigError as `put_peft` does."""
    parts = put_peft(base, config, rounded=rounded, routed=routed)
    return Attached(parts.model, parts.save, parts.load)


def rewrite(weights: Path, rounded: tuple[str, ...], **added: torch.Tensor) -> None:
    """Round the named tensors of a safetensors file to bfloat16, and add others."""
    tensors = load_file(weights)
    for name, value in tensors.items():
        if any(part in name for part in rounded):
            tensors[name] = value.to(torch.bfloat16)
    save_file(tensors | added, weights, metadata={"format": "pt"})
    weights.chmod(0o644)


def target_modules(base: LoadedBase, config: TrainConfig) -> list[str] | str:
    """In PEFT's words: the chosen ones, else all linear modules but the head; of a mixture, those of attention."""
    if not config.targets and is_mixture(base.model.config):
        return target_names(base, config)
    return list(config.targets) or "all-linear"


def target_names(base: LoadedBase, config: TrainConfig) -> list[str]:
    """As `target_modules`, for methods that take no "all-linear"."""
    if config.targets:
        return list(config.targets)
    head = base.model.get_output_embeddings()
    names = (name for name in base.shape.sites if base.model.get_submodule(name) is not head)
    if is_mixture(base.model.config):
        names = (name for name in names if ".mlp." not in name)
    return sorted({name.rpartition(".")[2] for name in names})


def is_transposed(base: LoadedBase) -> bool:
    """Whether the base's linear modules are GPT-2's Conv1D, whose weights lie the other way round."""
    return any(isinstance(module, Conv1D) for module in base.model.modules())


def task_type(base: LoadedBase) -> str:
    """Return PEFT's name for the base's kind."""
    if base.shape.encoder_decoder:
        return "SEQ_2_SEQ_LM"
    return "FEATURE_EXTRACTION" if base.shape.encoder else "CAUSAL_LM"
