"""LoRA (Hu et al. 2021) and QLoRA (Dettmers et al. 2023), which is LoRA on a 4-bit base."""

from dataclasses import replace
from typing import Any

from peft import LoraConfig

from onebase_contract.settings import TrainConfig
from onebase_engine.base.load_base import LoadedBase
from onebase_engine.base.mixture import is_mixture
from onebase_training.methods.fast_lora import speed_up
from onebase_training.methods.mixture_lora import load_stacked, mixture_targets, save_stacked
from onebase_training.methods.peft_parts import attach_peft, is_transposed, target_modules, task_type
from onebase_training.model.attached import Attached

LEARNING_RATE = 1e-3
"""Measured, see docs/decisions/0044. Larger bases want less: QLoRA has 2e-4 for 7B and 1e-4 from 33B on."""
RANK = 16
ROUNDED = ("lora_A", "lora_B")


def attach(base: LoadedBase, config: TrainConfig, steps: int) -> Attached:
    """Low-rank updates on the chosen linear modules, float32, B at zero."""
    return attach_lora(base, config)


def attach_lora(base: LoadedBase, config: TrainConfig, **options: Any) -> Attached:
    """LoRA with a variant's `options` of PEFT's; of a mixture also on its router and experts."""
    settings = lora_config(base, config, **options)
    targets = mixture_targets(base, config) if is_mixture(base.model.config) else None
    if targets is not None:
        settings.target_modules = set(targets)
    attached = attach_peft(base, settings, rounded=ROUNDED, routed=True)
    speed_up(attached.model, config)
    if targets is None or attached.load is None:
        return attached
    save = save_stacked(base, targets, attached.save)
    return replace(attached, save=save, load=load_stacked(base, attached.load))


def lora_config(base: LoadedBase, config: TrainConfig, **options: Any) -> LoraConfig:
    """PEFT's configuration, with a variant's `options`."""
    rank = config.rank or RANK
    return LoraConfig(
        r=rank,
        lora_alpha=2.0 * rank if config.alpha is None else config.alpha,
        lora_dropout=config.dropout,
        target_modules=target_modules(base, config),
        rank_pattern=dict(config.rank_pattern),
        alpha_pattern=dict(config.alpha_pattern),
        modules_to_save=list(config.modules_to_save) or None,
        bias=config.bias,
        fan_in_fan_out=is_transposed(base),
        task_type=task_type(base),
        **options,
    )
