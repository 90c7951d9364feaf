"""Bottleneck adapters: Houlsby et al. 2019 (behind attention and MLP), Pfeiffer et al. 2021 (behind the MLP),
parallel (He et al. 2022, beside the MLP). PEFT has no such method; the files' format is described in
`onebase_adapters.lowering.bottleneck`."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from onebase_adapters.errors import ConfigError
from onebase_adapters.formats.peft_folder import CONFIG_FILE, WEIGHTS_FILE
from onebase_contract.settings import TrainConfig
from onebase_engine.base.load_base import LoadedBase
from onebase_training.model.attached import Attached

LEARNING_RATE = 1e-3
"""Measured, see docs/decisions/0044. Houlsby et al. search 3e-5 to 3e-3."""

_ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU, "tanh": nn.Tanh}
_MLP = ("mlp", "output.dense")
"""Ends of the names of blocks that are not attention. (`attention.output.dense` is: see `_is_mlp`.)"""


class Bottleneck(nn.Module):
    """scale * up(act(down(x))), [..., hidden] -> same; zero at first (Houlsby et al. 2019, section 2.1)."""

    def __init__(self, hidden: int, size: int, activation: str, scale: float) -> None:
        super().__init__()
        self.down = nn.Linear(hidden, size)
        self.up = nn.Linear(size, hidden)
        self.activation = _ACTIVATIONS[activation]()
        self.scale = scale
        nn.init.normal_(self.down.weight, std=0.02)
        nn.init.zeros_(self.down.bias)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.up(self.activation(self.down(x)))
        return made * self.scale


def attach(base: LoadedBase, config: TrainConfig, steps: int) -> Attached:
    """A bottleneck at each block of the base that the placement names."""
    parallel = config.placement == "parallel"
    sites = sorted(site for site in base.shape.sublayers if config.placement == "houlsby" or _is_mlp(site))
    if not sites:
        raise ConfigError(f"{base.shape.name} has no blocks that bottleneck adapters go behind.", field="method")
    made: dict[str, Bottleneck] = {}
    for site in sites:
        made[site] = Bottleneck(base.shape.hidden, config.bottleneck, config.activation, config.scale)
        made[site].to(base.device)
        base.model.get_submodule(site).register_forward_hook(_hook(made[site], parallel=parallel))
    settings = {
        "peft_type": "BOTTLENECK",
        "base_model_name_or_path": base.shape.hub_id,
        "placement": config.placement,
        "bottleneck_size": config.bottleneck,
        "activation": config.activation,
        "scale": config.scale,
    }

    def save(folder: Path) -> None:
        # Rounded as each forward pass of training rounds them.
        tensors = {
            f"{site}.{name}": value.detach().to(torch.bfloat16).cpu()
            for site, module in made.items()
            for name, value in module.state_dict().items()
        }
        (folder / CONFIG_FILE).write_text(json.dumps(settings, indent=2))
        save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})

    def load(tensors: Mapping[str, torch.Tensor]) -> None:
        for site, module in made.items():
            own = {
                name.removeprefix(f"{site}."): value
                for name, value in tensors.items()
                if name.startswith(f"{site}.")
            }
            try:
                module.load_state_dict(own)
            except RuntimeError as error:
                raise ConfigError(f"The adapter to start from does not fit: {error}", field="init_from") from error

    return Attached(base.model, save, load, extra=nn.ModuleList(made.values()))


def _is_mlp(site: str) -> bool:
    return site.endswith(_MLP) and not site.endswith("attention.output.dense")


def _hook(module: Bottleneck, *, parallel: bool) -> Any:
    def hook(_: nn.Module, inputs: tuple[torch.Tensor, ...], output: Any) -> Any:
        # Attention gives its output and more.
        out = output[0] if isinstance(output, tuple) else output
        added = out + module(inputs[0] if parallel else out)
        return (added, *output[1:]) if isinstance(output, tuple) else added

    return hook
