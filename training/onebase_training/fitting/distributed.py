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


@dataclass(frozen=True)
class Ranks:
    """This process among all of a run."""

    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        return self.rank == 0


ALONE = Ranks()


def this_process() -> Ranks:
    """From what torchrun tells each process; one process without it."""
    return Ranks(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))


def take_own_gpu() -> None:
    """Let `cuda` mean another GPU in each of a machine's processes."""
    if torch.cuda.is_available() and "LOCAL_RANK" in os.environ:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())


def barrier() -> None:
    """Wait for all processes."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()


def leave_deepspeed() -> None:
    """Let transformers load a model as without ZeRO-3, once the run's own is trained."""
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()


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


def deepspeed_settings(stage: str, *, offload: bool) -> dict[str, Any]:
    """DeepSpeed's configuration for `zero2` or `zero3`. Raises ConfigError where it is not installed."""
    from importlib.util import find_spec

    if find_spec("deepspeed") is None:
        raise ConfigError(
            "DeepSpeed is not installed: pip install --no-build-isolation 'onebase[deepspeed]'.", field="deepspeed"
        )
    # DeepSpeed calls torch's collectives by names that torch has given up, thousands of times.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    zero: dict[str, Any] = {"stage": int(stage[-1])}
    if offload:
        zero["offload_optimizer"] = {"device": "cpu"}
        if stage == "zero3":
            zero["offload_param"] = {"device": "cpu"}
    return {
        "zero_optimization": zero,
        # Trained parameters are float32 and frozen ones bfloat16: as they are, and as in a run without DeepSpeed.
        "bf16": {"enabled": False},
        "fp16": {"enabled": False},
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
    }
