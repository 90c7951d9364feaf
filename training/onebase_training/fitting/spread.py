"""How a run's processes share one model: each has a copy (DDP), each has its parts (fsdp), or DeepSpeed does it.

The loop sees one seam: add a batch's gradient, make a step, and keep the optimiser's state in a checkpoint.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from onebase_adapters.errors import ConfigError
from onebase_contract.settings import TrainConfig
from onebase_training.fitting import fsdp
from onebase_training.fitting.distributed import Ranks, deepspeed_engine, meet
from onebase_training.fitting.optimizer import make_optimizer
from onebase_training.model.trained_model import Trained

_OPTIMIZER_FILE = "optimizer.pt"


class Spread(Protocol):
    """A model and its optimiser, wherever their parts are."""

    @property
    def optimizer(self) -> torch.optim.Optimizer: ...

    def backward(self, loss_of: Callable[[nn.Module], torch.Tensor], *, last: bool) -> torch.Tensor:
        """Add the gradient of what `loss_of` makes of the module, a scalar, and give its value. Gradients are
        averaged over the processes by the `last` batch of a step."""

    def step(self) -> float:
        """Clip the gradient and follow it; gives its norm before."""

    def save(self, folder: Path) -> None:
        """Write the optimiser's state. All processes must call."""

    def load(self, folder: Path) -> None:
        """Take it back."""


def spread(model: Trained, config: TrainConfig, ranks: Ranks) -> Spread:
    """Share `model` among the processes as `config` says. Raises ConfigError for methods that cannot be."""
    attached = model.attached
    if config.spread and (attached.penalty or attached.after_step or attached.state):
        name = "fsdp" if config.fsdp else "deepspeed"
        raise ConfigError(
            f"This method looks at whole parameters between steps: train it without {name}.", field=name
        )
    meet(ranks, model.device)
    if config.deepspeed != "none":
        optimizer = make_optimizer(model, config)
        return _ByDeepSpeed(deepspeed_engine(model, optimizer, config), optimizer)
    if config.fsdp:
        fsdp.shard(model, world=ranks.world, offload=config.offload)
    shared = DistributedDataParallel(model) if ranks.world > 1 and not config.fsdp else model
    return _ByTorch(shared, make_optimizer(model, config), config.clip or math.inf, ranks)


@dataclass(frozen=True)
class _ByTorch:
    module: nn.Module
    """The model itself, its copy among others, or its parts."""
    optimizer: torch.optim.Optimizer
    clip: float
    ranks: Ranks

    def backward(self, loss_of: Callable[[nn.Module], torch.Tensor], *, last: bool) -> torch.Tensor:
        module = self.module
        with module.no_sync() if isinstance(module, DistributedDataParallel) and not last else nullcontext():
            loss = loss_of(module)
            torch.autograd.backward(loss)
        return loss.detach()

    def step(self) -> float:
        trained = [value for value in self.module.parameters() if value.requires_grad]
        norm = nn.utils.clip_grad_norm_(trained, self.clip)
        self.optimizer.step()
        return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)

    def save(self, folder: Path) -> None:
        state = fsdp.optimizer_state(self.module, self.optimizer)
        if self.ranks.first:
            torch.save(state, folder / _OPTIMIZER_FILE)

    def load(self, folder: Path) -> None:
        state = torch.load(folder / _OPTIMIZER_FILE, weights_only=True)
        fsdp.put_optimizer_state(self.module, self.optimizer, state)


@dataclass(frozen=True)
class _ByDeepSpeed:
    engine: Any
    optimizer: torch.optim.Optimizer

    def backward(self, loss_of: Callable[[nn.Module], torch.Tensor], *, last: bool) -> torch.Tensor:
        self.engine.set_gradient_accumulation_boundary(is_boundary=last)
        loss = loss_of(self.engine)
        self.engine.backward(loss)
        return loss.detach()

    def step(self) -> float:
        self.engine.step()
        return float(self.engine.get_global_grad_norm())

    def save(self, folder: Path) -> None:
        self.engine.save_checkpoint(str(folder), exclude_frozen_parameters=True)

    def load(self, folder: Path) -> None:
        self.engine.load_checkpoint(str(folder), load_module_strict=False)
