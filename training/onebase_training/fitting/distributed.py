"""Several processes, as torchrun starts them: which one this is, and parameters that are spread over all of them.

Each process takes its own batches of the plan; all measure the same held-out part, since a model in pieces (ZeRO-3)
only runs if all run it. The first one alone writes to the disk and tells of progress.
"""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from onebase_adapters.errors import ConfigError
from onebase_contract.settings import TrainConfig


@dataclass(frozen=True)
class Ranks:
    """This process among all of a run."""

    rank: int = 0
    world: int = 1
    launched: bool = False
    """Whether torchrun, or its like, has started it."""

    @property
    def first(self) -> bool:
        return self.rank == 0


ALONE = Ranks()


def this_process() -> Ranks:
    """From what torchrun tells each process; one process without it."""
    launched = "LOCAL_RANK" in os.environ
    return Ranks(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")), launched)


def take_own_gpu() -> None:
    """Let `cuda` mean another GPU in each of a machine's processes."""
    if torch.cuda.is_available() and "LOCAL_RANK" in os.environ:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())


def meet(ranks: Ranks, device: torch.device) -> None:
    """Join the run's other processes."""
    if ranks.launched and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")


def barrier() -> None:
    """Wait for all processes."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()


def total(value: float, device: torch.device) -> float:
    """The sum over all processes."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return value
    summed = torch.tensor(value, dtype=torch.float64, device=device)
    torch.distributed.all_reduce(summed)
    return float(summed)


@contextmanager
def gathered(model: nn.Module, *, written: bool = False) -> Iterator[None]:
    """Within it, trained parameters that ZeRO-3 has spread are whole everywhere. All processes must enter.
    `written`: what the first process writes into them reaches all."""
    spread = [value for value in model.parameters() if value.requires_grad and hasattr(value, "ds_id")]
    if not spread:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(spread, modifier_rank=0 if written else None):
        yield


def deepspeed_engine(model: nn.Module, optimizer: torch.optim.Optimizer, config: TrainConfig) -> Any:
    """DeepSpeed's hold on `model`, by its stage 2 or 3. Raises ConfigError where it is not installed."""
    from importlib.util import find_spec

    if find_spec("deepspeed") is None:
        raise ConfigError(
            "DeepSpeed is not installed: pip install --no-build-isolation 'onebase[deepspeed]'.", field="deepspeed"
        )
    # DeepSpeed calls torch's collectives by names that torch has given up, thousands of times.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    import deepspeed

    from onebase_training.fitting.extension_locks import extensions

    zero: dict[str, Any] = {"stage": int(config.deepspeed[-1])}
    if config.offload:
        zero["offload_optimizer"] = {"device": "cpu"}
        if config.deepspeed == "zero3":
            zero["offload_param"] = {"device": "cpu"}
    settings = {
        "zero_optimization": zero,
        # Trained parameters are float32 and frozen ones bfloat16: as they are, and as in a run without DeepSpeed.
        "bf16": {"enabled": False},
        "fp16": {"enabled": False},
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": config.clip,
        # The loop says itself which batch is a step's last.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
    }
    with extensions():
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    return engine
