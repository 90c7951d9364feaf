"""Random LoRA adapters for benchmarks: their numbers mean nothing, their cost is that of trained ones."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from onebase_adapters.base.shape import BaseShape


def make_adapters(base: BaseShape, folder: Path, count: int, rank: int = 8) -> list[Path]:
    """`count` PEFT folders, rank `rank`, on every linear site but the head."""
    sites = [site for site in base.sites.values() if site.name != "lm_head"]
    targets = sorted({site.name.rpartition(".")[2] for site in sites})
    made = []
    for number in range(count):
        target = folder / f"adapter-{number:03d}"
        target.mkdir(parents=True, exist_ok=True)
        generator = torch.Generator().manual_seed(number)
        tensors = {}
        for site in sites:
            key = f"base_model.model.{site.name}.lora_"
            tensors[key + "A.weight"] = torch.randn(rank, site.in_features, generator=generator) * 0.02
            tensors[key + "B.weight"] = torch.randn(site.out_features, rank, generator=generator) * 0.02
        save_file(tensors, target / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": 16, "target_modules": targets}
        config |= {
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base.name,
            "lora_dropout": 0.0,
            "bias": "none",
        }
        (target / "adapter_config.json").write_text(json.dumps(config))
        made.append(target)
    return made
