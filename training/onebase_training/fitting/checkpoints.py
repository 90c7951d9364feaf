"""Checkpoints: folders that are whole or not there, with trained parameters and all that the next step needs."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from onebase_adapters.atomic_files import disk_errors
from onebase_adapters.errors import ConfigError
from onebase_training.fitting import fsdp
from onebase_training.fitting.distributed import Ranks, barrier, gathered
from onebase_training.model.trained_model import Trained, trainable_state

_STATE_FILE = "state.json"
_TRAINED_FILE = "trained.safetensors"


@dataclass
class RunState:
    """How far a run has come."""

    step: int = 0
    """Steps done."""
    best_step: int = 0
    """After which the best evaluation was; 0: there was none."""
    log: list[dict[str, float]] = field(default_factory=list)
    """See `early_stopping.Log`."""


@contextmanager
def staged_checkpoint(target: Path, ranks: Ranks) -> Iterator[Path]:
    """A folder that all processes write into, which the first one then puts in `target`'s place: it is there for
    all when this ends."""
    scratch = target.with_name(f".{target.name}.partial")
    with disk_errors(str(target)):
        if ranks.first:
            shutil.rmtree(scratch, ignore_errors=True)  # of a run that was killed
            scratch.mkdir(parents=True)
        barrier()
        try:
            yield scratch
            barrier()
            if ranks.first:
                shutil.rmtree(target, ignore_errors=True)
                scratch.replace(target)
            barrier()
        finally:
            if ranks.first:
                shutil.rmtree(scratch, ignore_errors=True)


def save_trained(model: Trained, folder: Path, ranks: Ranks) -> None:
    """Write the trained parameters into `folder`."""
    with gathered(model), fsdp.whole(model):
        if ranks.first:
            save_file({name: value.contiguous() for name, value in _state(model).items()}, folder / _TRAINED_FILE)


def restore(model: Trained, checkpoint: Path) -> None:
    """Copy a checkpoint's parameters into `model`."""
    stored = load_file(checkpoint / _TRAINED_FILE)
    with torch.no_grad(), gathered(model, written=True):
        for name, value in _state(model).items():
            fsdp.put(value, stored[name])


def keep_only(work: Path, names: set[str]) -> None:
    """Delete the other checkpoints."""
    for old in work.glob("checkpoint-*"):
        if old.name not in names:
            shutil.rmtree(old)


def last_checkpoint(work: Path) -> Path | None:
    """The newest one."""
    return max(work.glob("checkpoint-*"), key=step_of, default=None)


def step_of(checkpoint: Path) -> int:
    """Steps done when it was written."""
    return int(checkpoint.name.rpartition("-")[2])


def checkpoint_of(work: Path, step: int) -> Path:
    """Where the checkpoint after so many steps is."""
    return work / f"checkpoint-{step}"


def write_state(state: RunState, checkpoint: Path) -> None:
    """Into the checkpoint's folder."""
    (checkpoint / _STATE_FILE).write_text(json.dumps(asdict(state)))


def read_state(checkpoint: Path) -> RunState:
    """As the run was at this checkpoint. Raises ConfigError if another version has written it."""
    try:
        return RunState(**json.loads((checkpoint / _STATE_FILE).read_text()))
    except (FileNotFoundError, TypeError) as error:
        raise ConfigError(
            f"{checkpoint} is of another version of OneBase. Start again with --overwrite.", field="resume"
        ) from error


def history(work: Path) -> list[dict[str, float]]:
    """The log of the newest checkpoint."""
    newest = last_checkpoint(work)
    return read_state(newest).log if newest else []


def _state(model: Trained) -> dict[str, torch.Tensor]:
    """Trained parameters, and what else the method changes as it goes. No copies."""
    kept = model.attached.state() if model.attached.state else {}
    return {name: value.detach() for name, value in (trainable_state(model) | kept).items()}
