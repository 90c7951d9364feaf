"""llama.cpp's names for what transformers has under others."""

from onebase_adapters.errors import AdapterError
from onebase_engine.base.gguf_file import ARCHITECTURES

_MODEL_TYPES = {"llama": "llama", "mistral": "llama", "gemma3_text": "gemma3"}
"""Architectures, where they are not transformers'."""


def architecture_of(model_type: str) -> str:
    """The name of an architecture whose tensors are known. Raises AdapterError."""
    architecture = _MODEL_TYPES.get(model_type, model_type)
    if architecture not in ARCHITECTURES:
        raise AdapterError(
            f"Bases of the type {model_type} are not written as GGUF here: {', '.join(ARCHITECTURES)} are.",
            field="model",
        )
    return architecture
