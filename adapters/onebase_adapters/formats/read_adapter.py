"""Reading an adapter's folder: what PEFT writes, and nothing that could run code or poison a batch.

`adapter_config.json` and `adapter_model.safetensors`, plus `onebase.json` where our trainer made it.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from onebase_adapters.base_shape import BaseShape
from onebase_adapters.errors import AdapterFormatError, AdapterMismatchError, AdapterPathError
from onebase_adapters.formats.checks import check_listing
from onebase_adapters.formats.peft_folder import CONFIG_FILE, SIDECAR_FILE, WEIGHTS_FILE, read_object


@dataclass(frozen=True)
class AdapterFiles:
    """An adapter as stored."""

    config: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    sidecar: dict[str, Any]
    """Our trainer's notes (base fingerprint, data, metrics); empty for a foreign adapter."""


def read_adapter(folder: Path) -> AdapterFiles:
    """Read and check a folder. Raises AdapterPathError (nothing there) or AdapterFormatError (unsafe, broken)."""
    if not folder.is_dir():
        raise AdapterPathError(f"{folder} is not a folder.", field="path")
    check_listing([entry.name for entry in folder.iterdir() if entry.is_file()])
    try:
        tensors = load_file(folder / WEIGHTS_FILE)
    except (SafetensorError, ValueError) as error:
        raise AdapterFormatError(
            f"{WEIGHTS_FILE} is not a whole safetensors file: {error}", field="path"
        ) from error
    except OSError as error:
        raise AdapterPathError(f"{WEIGHTS_FILE} cannot be read: {error}", field="path") from error
    for name, tensor in tensors.items():
        if tensor.is_complex():
            raise AdapterFormatError(f"Tensor {name!r} is {tensor.dtype}: weights are real.", field="path")
        # In the float32 that it is computed in, where a float64 may not fit.
        if not bool(torch.isfinite(tensor.float()).all()):
            raise AdapterFormatError(f"Tensor {name!r} holds NaN or infinity.", field="path")
    return AdapterFiles(read_object(folder / CONFIG_FILE), tensors, read_object(folder / SIDECAR_FILE))


def check_base(files: AdapterFiles, base: BaseShape) -> None:
    """Refuse an adapter that says it was trained on another base. Raises AdapterMismatchError.

    A foreign adapter says so only by its shapes, which lowering checks.
    """
    trained_on = files.sidecar.get("base", {})
    fingerprint = trained_on.get("fingerprint") if isinstance(trained_on, dict) else None
    if fingerprint and fingerprint != base.fingerprint:
        raise AdapterMismatchError(
            f"Trained on {trained_on.get('model', 'another base')} ({fingerprint}), but this server's base is "
            f"{base.name} ({base.fingerprint}): other weights. Serve that base, or train again on this one.",
            field="path",
        )
