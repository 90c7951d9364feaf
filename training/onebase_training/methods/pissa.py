"""PiSSA (Meng et al. 2024): LoRA that begins with the weights' principal components, taken out of the base.

What is written is a LoRA of twice the rank for the untouched base: the trained part, minus what was taken out.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from onebase_adapters.factorise import refactorise
from onebase_adapters.formats.peft_folder import CONFIG_FILE, WEIGHTS_FILE
from onebase_contract.settings import TrainConfig
from onebase_engine.base.load_base import LoadedBase
from onebase_training.methods import lora
from onebase_training.methods.fast_lora import speed_up
from onebase_training.methods.peft_parts import put_peft
from onebase_training.model.attached import Attached

LEARNING_RATE = 5e-4
"""Half of LoRA's: both matrices begin large, and move the update at once."""
_ITERATIONS = 4
"""Iterations of the fast decomposition (Halko et al. 2011), as in the paper's experiments."""


def attach(base: LoadedBase, config: TrainConfig, steps: int) -> Attached:
    """alpha is the rank, as the initialisation needs."""
    config = config.resolved(alpha=float(config.rank or lora.RANK))
    parts = put_peft(base, lora.lora_config(base, config, init_lora_weights=f"pissa_niter_{_ITERATIONS}"))
    speed_up(parts.model, config)
    taken_out = {
        f"base_model.model.{name.replace('.default', '')}": value.detach().clone()
        for name, value in parts.model.named_parameters()
        if "lora_" in name
    }

    def save(folder: Path) -> None:
        parts.save(folder)
        _as_lora(folder, taken_out)

    return Attached(parts.model, save)


def _as_lora(folder: Path, taken_out: dict[str, torch.Tensor]) -> None:
    """B A - B0 A0 as one product of twice the rank, in bfloat16."""
    tensors = load_file(folder / WEIGHTS_FILE)
    for name in [name for name in taken_out if "lora_A" in name]:
        other = name.replace("lora_A", "lora_B")
        a = torch.cat([tensors[name], taken_out[name]])
        b = torch.cat([tensors[other], -taken_out[other]], 1)
        for key, factor in zip((name, other), refactorise(a, b), strict=True):
            tensors[key] = factor.to(torch.bfloat16).contiguous()
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    settings = json.loads((folder / CONFIG_FILE).read_text())
    settings |= {"r": 2 * settings["r"], "lora_alpha": 2 * settings["lora_alpha"], "init_lora_weights": True}
    for pattern in ("rank_pattern", "alpha_pattern"):
        settings[pattern] = {key: 2 * value for key, value in (settings.get(pattern) or {}).items()}
    (folder / CONFIG_FILE).write_text(json.dumps(settings, indent=2))
