"""Reading an adapter's folder: what PEFT writes, and nothing that could run code or poison a batch.

`adapter_config.json` and `adapter_model.safetensors`, plus `onebase.json` where our trainer made it.
"""

import gzip
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, load_file

from onebase_adapters.base_shape import BaseShape
from onebase_adapters.errors import AdapterFormatError, AdapterMismatchError, AdapterPathError
from onebase_adapters.formats.chat_template import read_chat_template
from onebase_adapters.formats.checks import check_listing
from onebase_adapters.formats.peft_folder import CONFIG_FILE, SIDECAR_FILE, read_object

_LFS_POINTER, _GZIP = b"version https://git-lfs", b"\x1f\x8b"
_MOST_HEADER_BYTES = 16 << 20
_MOST_INFLATION = 64


@dataclass(frozen=True)
class AdapterFiles:
    """An adapter as stored."""

    config: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    sidecar: dict[str, Any]
    """Our trainer's notes (base fingerprint, data, metrics); empty for a foreign adapter."""
    chat_template: str | None = None
    """That chats with it are to be written by, where it brings one."""


def read_adapter(folder: Path) -> AdapterFiles:
    """Read and check a folder. Raises AdapterPathError (nothing there) or AdapterFormatError (unsafe, broken)."""
    if not folder.is_dir():
        raise AdapterPathError(f"{folder} is not a folder.", field="path")
    tensors: dict[str, torch.Tensor] = {}
    for name in check_listing([entry.name for entry in folder.iterdir() if entry.is_file()]):
        tensors |= _read_weights(folder / name)
    for name, tensor in tensors.items():
        if tensor.is_complex():
            raise AdapterFormatError(f"Tensor {name!r} is {tensor.dtype}: weights are real.", field="path")
        # In the float32 that it is computed in, where a float64 may not fit.
        if not bool(torch.isfinite(tensor.float()).all()):
            raise AdapterFormatError(f"Tensor {name!r} holds NaN or infinity.", field="path")
    return AdapterFiles(
        read_object(folder / CONFIG_FILE),
        tensors,
        read_object(folder / SIDECAR_FILE),
        read_chat_template(folder),
    )


def _read_weights(path: Path) -> dict[str, torch.Tensor]:
    try:
        with path.open("rb") as file:
            begins = file.read(32)
        if begins.startswith(_LFS_POINTER):
            raise AdapterFormatError(
                f"{path.name} is a pointer of Git LFS and not the file itself: git lfs pull fetches it.",
                field="path",
            )
        if begins.startswith(_GZIP):
            most = _MOST_INFLATION * path.stat().st_size
            with gzip.open(path) as compressed:
                content = compressed.read(most + 1)
            if len(content) > most:
                raise AdapterFormatError(
                    f"{path.name} is compressed more than {_MOST_INFLATION} times, as weights are not.",
                    field="path",
                )
            _check_header(path.name, content[:8])
            return load(content)
        _check_header(path.name, begins[:8])
        return load_file(path)
    except (SafetensorError, ValueError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise AdapterFormatError(f"{path.name} is not a whole safetensors file: {error}", field="path") from error
    except OSError as error:
        raise AdapterPathError(f"{path.name} cannot be read: {error}", field="path") from error


def _check_header(name: str, begins: bytes) -> None:
    """By the length that a safetensors file begins with: reading a long header takes minutes."""
    if (length := int.from_bytes(begins, "little")) > _MOST_HEADER_BYTES:
        raise AdapterFormatError(
            f"{name} begins with a header of {length:,} bytes: it is no safetensors file, or has more tensors than "
            f"any adapter (at most {_MOST_HEADER_BYTES:,} bytes, some 100,000 tensors).",
            field="path",
        )


def check_base(files: AdapterFiles, base: BaseShape) -> tuple[str, ...]:
    """Refuse an adapter that says it was trained on another base; gives what its owner should know if it was
    trained on the same one in another form. Raises AdapterMismatchError.

    A foreign adapter says so only by its shapes, which lowering checks.
    """
    trained_on = files.sidecar.get("base", {})
    fingerprint = trained_on.get("fingerprint") if isinstance(trained_on, dict) else None
    if fingerprint and fingerprint != base.fingerprint:
        # Of a catalogued base alone it is known that two forms are one model: a folder's weights may be any.
        if base.hub_id != base.name and trained_on.get("hub_id") == base.hub_id:
            return (
                f"trained on {trained_on.get('model')}, served on {base.name}: the same model, rounded otherwise",
            )
        raise AdapterMismatchError(
            f"Trained on {trained_on.get('model', 'another base')} ({fingerprint}), but this server's base is "
            f"{base.name} ({base.fingerprint}): other weights. Serve that base, or train again on this one.",
            field="path",
        )
    return ()
