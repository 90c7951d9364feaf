"""Reading an adapter's folder: what PEFT writes, and nothing that could run code or poison a batch.

`adapter_config.json` and `adapter_model.safetensors`, plus `onebase.json` where our trainer made it.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from onebase_adapters.base.shape import BaseShape
from onebase_adapters.errors import AdapterFormatError, AdapterMismatchError, AdapterPathError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
SIDECAR_FILE = "onebase.json"


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
    config = _read_json(folder / CONFIG_FILE)
    if config is None:
        raise AdapterFormatError(f"{folder.name} has no {CONFIG_FILE}: not a PEFT adapter.", field="path")
    weights = folder / WEIGHTS_FILE
    if not weights.is_file():
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt"))
        if pickles:
            raise AdapterFormatError(
                f"{pickles[0]} is a pickle, which can run code when it is read. Save the adapter again with "
                "save_pretrained(..., safe_serialization=True).",
                field="path",
            )
        raise AdapterFormatError(f"{folder.name} has no {WEIGHTS_FILE}.", field="path")
    try:
        tensors = load_file(weights)
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
    return AdapterFiles(config, tensors, _read_json(folder / SIDECAR_FILE) or {})


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise AdapterFormatError(f"{path.name} is not JSON: {error}", field="path") from error
    except OSError as error:
        raise AdapterPathError(f"{path.name} cannot be read: {error}", field="path") from error
    if not isinstance(value, dict):
        raise AdapterFormatError(f"{path.name} is not a JSON object.", field="path")
    return value


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
