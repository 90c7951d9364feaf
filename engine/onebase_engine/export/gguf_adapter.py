"""An adapter for llama.cpp: its low-rank updates as a GGUF file, which is read back before it is kept.

llama.cpp knows one kind of adapter, LoRA on linear weights. Every method that is lowered to low-rank updates alone
is exported as that; the scale is in `lora_b`, so that ranks may differ.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from onebase_adapters.atomic_files import disk_errors
from onebase_adapters.errors import AdapterError
from onebase_adapters.primitives.instruction_set import LowRank
from onebase_adapters.primitives.lowered_adapter import LoweredAdapter
from onebase_engine.base.gguf_file import ARCHITECTURES, rows_of
from onebase_engine.base.load_base import LoadedBase
from onebase_engine.export.gguf_names import architecture_of
from onebase_engine.export.model_card import Card, card_of, check_free, render_card


def write_gguf_adapter(
    base: LoadedBase, adapter: LoweredAdapter, file: Path, notes: Mapping[str, Any] | None = None
) -> int:
    """Write the file and its card, with the `notes` of `onebase.json`; gives how many weights it changes. Raises
    ConfigError (it exists), AdapterError for what llama.cpp has no place for, or StorageError."""
    check_free(file)
    architecture = architecture_of(base.shape.model_type)
    updates = _updates(base, adapter)
    config = base.model.config
    names = gguf.get_tensor_name_map(ARCHITECTURES[architecture], config.num_hidden_layers)
    parts: dict[str, np.ndarray] = {}
    for update in updates:
        order = rows_of(f"{update.site}.weight", config, architecture)
        b = update.scale * update.b.float()
        if not isinstance(order, slice):
            b = b[order.argsort()]
        name = f"{names.get_name(update.site)}.weight"
        if f"{name}.lora_a" in parts:
            raise AdapterError(f"The adapter has two updates for {update.site}: compose it to one.", field="path")
        parts[f"{name}.lora_a"], parts[f"{name}.lora_b"] = update.a.float().numpy(), b.numpy()
    partial = file.with_name(f".{file.name}.partial")
    with disk_errors(str(file)):
        try:
            _write(partial, architecture, parts)
            _check(partial, parts)
            partial.replace(file)
            card_of(file).write_text(_card(base, adapter, file.name, notes or {}), encoding="utf-8")
        finally:
            partial.unlink(missing_ok=True)
    return len(updates)


def _card(base: LoadedBase, adapter: LoweredAdapter, name: str, notes: Mapping[str, Any]) -> str:
    about = f"An adapter of {notes.get('method', adapter.method)} for {base.shape.hub_id}, as llama.cpp reads it."
    commands = [f"llama-server -m BASE.gguf --lora {name}"]
    return render_card(Card(name, base.shape.hub_id, "gguf", "adapter", about, commands, notes))


def _updates(base: LoadedBase, adapter: LoweredAdapter) -> list[LowRank]:
    others = {type(one).__name__ for one in adapter.primitives if not isinstance(one, LowRank)}
    updates = adapter.of(LowRank)
    if any(update.site == base.shape.embedding for update in updates):
        others.add("an update of the embedding")
    if others:
        raise AdapterError(
            f"llama.cpp has no place for this adapter's {', '.join(sorted(others))}: `onebase adapters merge` may "
            "do.",
            field="path",
        )
    return updates


def _write(file: Path, architecture: str, parts: dict[str, np.ndarray]) -> None:
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 0.0)  # none beside what is in lora_b
    for name, part in parts.items():
        writer.add_tensor(name, np.ascontiguousarray(part))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _check(file: Path, parts: dict[str, np.ndarray]) -> None:
    """Read it back."""
    found = {tensor.name: torch.from_numpy(np.array(tensor.data)) for tensor in gguf.GGUFReader(file).tensors}
    if found.keys() != parts.keys() or any(
        not torch.equal(found[name], torch.from_numpy(np.ascontiguousarray(part))) for name, part in parts.items()
    ):
        raise AdapterError(f"{file} does not hold what was written: nothing is kept.", field="output")
