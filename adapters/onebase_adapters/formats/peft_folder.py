"""The files of an adapter's folder, and what can be told of them without torch: PEFT's two, and our notes."""

import json
from pathlib import Path
from typing import Any

from onebase_adapters.errors import AdapterFormatError, AdapterPathError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
SIDECAR_FILE = "onebase.json"
"""Our trainer's notes: base fingerprint, metrics, labels of a head."""


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty if there is no such file. Raises AdapterFormatError or AdapterPathError."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise AdapterFormatError(f"{path.name} is not JSON: {error}.", field="path") from error
    except OSError as error:
        raise AdapterPathError(f"{path.name} cannot be read: {error}.", field="path") from error
    if not isinstance(value, dict):
        raise AdapterFormatError(f"{path.name} is not a JSON object.", field="path")
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise AdapterFormatError(
            f"{path.name} holds half of a surrogate pair (an escape such as \\ud83d alone), which is no text.",
            field="path",
        ) from error
    return value
