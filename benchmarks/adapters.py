"""Random LoRA adapters for benchmarks: their numbers mean nothing, their cost is that of trained ones.

    python -m benchmarks.adapters --root out/random --count 64 --url http://127.0.0.1:8000 --admin-key KEY

puts them into a server's adapter root and registers them, for `benchmarks.load` to name.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import httpx
import torch
from safetensors.torch import save_file

from onebase_adapters.base_shape import BaseShape
from onebase_engine.base.base_spec import DEFAULT_BASE, BaseSpec
from onebase_engine.base.load_base import load_base


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


def register(folders: Sequence[Path], url: str, key: str) -> list[str]:
    """Register folders of a server's adapter root; returns their names."""
    with httpx.Client(headers={"authorization": f"Bearer {key}"}, timeout=60) as client:
        for folder in folders:
            body = {"name": folder.name, "path": folder.name}
            client.post(f"{url}/v1/adapters", json=body).raise_for_status()
    return [folder.name for folder in folders]


def main() -> None:
    """Make and register."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--root", type=Path, required=True, help="the server's --adapter-root")
    parser.add_argument("--count", type=int, default=16)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--model", default=DEFAULT_BASE)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--admin-key", required=True)
    arguments = parser.parse_args()
    shape = load_base(BaseSpec(arguments.model)).shape
    folders = make_adapters(shape, arguments.root, arguments.count, arguments.rank)
    print(f"registered {len(register(folders, arguments.url, arguments.admin_key))} adapters")


if __name__ == "__main__":
    main()
