"""The identity of weights, by samples: a large model's full hash would cost minutes at each start, and no fine-tune
leaves all samples unchanged."""

import hashlib
import json
from pathlib import Path

_SAMPLES, _BYTES = 64, 1 << 16


def fingerprint_folder(folder: Path) -> str:
    """Identity of a base: its configuration and its weights, as 16 hex digits. Not how we quantise them: an adapter
    trained on the bfloat16 weights (LoRA) is served on their 4-bit form."""
    config = json.loads((folder / "config.json").read_text())
    volatile = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache")
    kept = json.dumps({k: v for k, v in config.items() if k not in volatile}, sort_keys=True)
    digest = hashlib.sha256(kept.encode())
    for path in sorted(folder.glob("*.safetensors")):
        _sample(path, digest)
    return digest.hexdigest()[:16]


def fingerprint_file(path: Path) -> str:
    """Identity of one file, as 16 hex digits."""
    digest = hashlib.sha256(str(path.stat().st_size).encode())
    _sample(path, digest)
    return digest.hexdigest()[:16]


def _sample(path: Path, digest: "hashlib._Hash") -> None:
    """The file's header, and as much at even offsets."""
    size = path.stat().st_size
    with path.open("rb") as file:
        for sample in range(_SAMPLES):
            file.seek(size * sample // _SAMPLES)
            digest.update(file.read(_BYTES))
