"""Which backend a served model runs on, and what a device wants prepared: decided here, once."""

import importlib.util
import logging
import os
import shutil
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

import torch
from torch import nn

from onebase_engine.kernels.interface import Build, Kernels
from onebase_engine.kernels.reference import backend as reference

log = logging.getLogger(__name__)


def choose_kernels(device: torch.device, dtype: torch.dtype, head_dim: int, widths: Iterable[int]) -> Kernels:
    """The fastest kernels for a model on `device` whose activations and cache are `dtype`; `widths` are the inputs
    of its linear sites."""
    if device.type == "cpu" and dtype == torch.bfloat16 and head_dim % 16 == 0 and not any(w % 4 for w in widths):
        from onebase_engine.kernels.cpu import backend, target

        if target.TARGET != target.PLAIN:
            return backend
        log.warning("%s is served by slow kernels: it is %s", device, target.PLAIN.name)
    if device.type == "cuda" and dtype == torch.bfloat16:
        lacking = _lacking_for_triton(device)
        if lacking is None:
            from onebase_engine.kernels.cuda import backend as cuda

            return cuda
        log.warning("%s is served by slow kernels: %s", device, lacking)
    log.info("kernels are the plain torch ones (%s, %s, head dim %d)", device, dtype, head_dim)
    return reference


def start_build(device: str, tell: Callable[[str], None]) -> Build | None:
    """Begin to compile, beside all else, the kernels that `device` ("auto" among them) is sure to need and that are
    not on disk; `tell` gets a line now and then."""
    if device != "cpu" and Path("/dev/nvidiactl").exists():
        return None
    from onebase_engine.kernels.cpu.build import Build

    return Build(tell)


def replace_emulated(model: nn.Module, *, always: Collection[nn.Module] = ()) -> None:
    """Let linear modules that are in bfloat16 multiply by kernels where torch would emulate it, and some always:
    in serving, on a CPU."""
    from onebase_engine.kernels.cpu.plain_product import replace_emulated

    replace_emulated(model, always)


def _lacking_for_triton(device: torch.device) -> str | None:
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "a GPU older than Ampere multiplies no bfloat16"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; pip install 'onebase[cuda]'"
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "triton needs a C compiler; install gcc"
    return None
