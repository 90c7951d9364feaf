"""Which device, and how much of its memory is free or taken."""

import sys

import psutil
import torch

from onebase_adapters.errors import BaseModelError


def resolve_device(device: str) -> torch.device:
    """`auto` is cuda where there is one. Raises BaseModelError for a device the machine lacks."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise BaseModelError(f"No device {device!r}; use cpu, cuda, cuda:N or auto.", field="device") from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise BaseModelError("No CUDA device on this machine; use --device cpu.", field="device")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise BaseModelError(
            f"No device {device}: this machine has {torch.cuda.device_count()}, from cuda:0 on.", field="device"
        )
    return chosen


def free_memory(device: torch.device) -> int:
    """In bytes: what there is, or what this process may still have of it."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    available = int(psutil.virtual_memory().available)
    if sys.platform != "linux":
        return available
    process = psutil.Process()
    allowed, _ = process.rlimit(psutil.RLIMIT_DATA)
    left = allowed - process.memory_info().data if allowed != psutil.RLIM_INFINITY else available
    return max(0, min(available, int(left)))


def _taken_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.memory_allocated(device))
    return int(psutil.Process().memory_info().rss)


def peak_memory(device: torch.device) -> int:
    """The most that this process has held so far, in bytes."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
