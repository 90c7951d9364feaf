"""The forms in which a model is written: plain names that need no torch."""

from typing import Literal

GgufForm = Literal["gguf", "gguf-f16", "gguf-q8_0"]
"""One GGUF file, with matrices in bfloat16, float16, or 8 bits."""
ModelForm = Literal["transformers", GgufForm]
"""Or a transformers folder in bfloat16."""
