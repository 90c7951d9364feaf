"""The methods by their PEFT type: one file each, one line here. Lowering turns stored tensors into primitives."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from onebase_adapters.base.shape import BaseShape
from onebase_adapters.errors import AdapterFormatError
from onebase_adapters.files import check_base, read_adapter
from onebase_adapters.methods import lora
from onebase_adapters.primitives import LoweredAdapter, Primitive


class Lower(Protocol):
    """A method's lowering. Raises AdapterFormatError (bad files) or AdapterMismatchError (wrong base)."""

    def __call__(
        self, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], base: BaseShape
    ) -> tuple[Primitive, ...]: ...


METHODS: dict[str, Lower] = {
    "LORA": lora.lower,
}


def load_adapter(folder: Path, digest: str, base: BaseShape) -> LoweredAdapter:
    """Read, check and lower the adapter in `folder` for `base`. Raises AdapterError and its branches."""
    files = read_adapter(folder)
    check_base(files, base)
    kind = str(files.config.get("peft_type", "")).upper()
    if kind not in METHODS:
        raise AdapterFormatError(
            f"peft_type {files.config.get('peft_type')!r} is not served. Known: {', '.join(sorted(METHODS))}.",
            field="peft_type",
        )
    primitives = METHODS[kind](files.config, files.tensors, base)
    if not primitives:
        raise AdapterFormatError("The adapter changes nothing: it has no weights for any site.", field="path")
    return LoweredAdapter(digest, kind.lower(), primitives)
