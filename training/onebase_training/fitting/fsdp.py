"""Fully sharded data parallelism (ZeRO, Rajbhandari et al. 2020) by torch's `fully_shard`: each process keeps its
part of every parameter, and a layer's are whole only while it computes.

Between steps every parameter is in parts.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from onebase_training.model.trained_model import Trained

_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def shard(model: Trained, *, world: int, offload: bool) -> None:
    """Spread the parameters of `model` over `world` processes: each layer's as one group, the rest as another.
    `offload`: parts lie on the host."""
    mesh = init_device_mesh(model.device.type, (world,))
    policy = CPUOffloadPolicy() if offload and model.device.type != "cpu" else OffloadPolicy()
    layers: Any = model.model._no_split_modules or ()
    groups: list[Any] = [module for module in model.modules() if type(module).__name__ in layers]
    for group in [*groups, model]:
        fully_shard(group, mesh=mesh, offload_policy=policy)
        if model.device.type == "cpu":  # gloo has no averages
            group.set_force_sum_reduction_for_comms(True)


def reshard(model: nn.Module) -> None:
    """Back into parts, after a forward pass that no backward pass followed."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def hold(model: nn.Module) -> None:
    """Keep whole what belongs to no layer, for those who call the layers without calling `model`."""
    if isinstance(model, FSDPModule):
        model.unshard()


@contextmanager
def whole(model: nn.Module) -> Iterator[None]:
    """Within it, trained parameters are plain and whole. All processes must enter."""
    reshard(model)
    swapped: list[tuple[nn.Module, str, nn.Parameter]] = []
    made: dict[int, nn.Parameter] = {}  # by identity: tied weights stay tied
    for module in model.modules():
        for name, value in list(module.named_parameters(recurse=False)):
            if isinstance(value, DTensor) and value.requires_grad:
                if id(value) not in made:
                    made[id(value)] = nn.Parameter(value.full_tensor().detach())
                swapped.append((module, name, value))
                setattr(module, name, made[id(value)])
    try:
        yield
    finally:
        for module, name, value in swapped:
            setattr(module, name, value)


def put(value: torch.Tensor, stored: torch.Tensor) -> None:
    """Copy a whole tensor into one that may be in parts."""
    if isinstance(value, DTensor):
        stored = distribute_tensor(
            stored.to(value.device_mesh.device_type), value.device_mesh, value.placements, src_data_rank=None
        ).to_local()
        value = value.to_local()
    value.copy_(stored)


def optimizer_state(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimiser's whole state, whether `module` is in parts or not. All processes must call."""
    if not isinstance(module, FSDPModule):
        return optimizer.state_dict()
    return get_optimizer_state_dict(module, optimizer, options=_WHOLE)


def put_optimizer_state(module: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Take back what `optimizer_state` gave."""
    if not isinstance(module, FSDPModule):
        optimizer.load_state_dict(state)
    else:
        set_optimizer_state_dict(module, optimizer, state, options=_WHOLE)
