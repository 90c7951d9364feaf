"""What a base takes once it is loaded, from the headers of its files: told before the first weight is read.

Weights are mapped from their files and turned one at a time into the form in which they are held, so that only
this form adds up. It is counted tensor by tensor, and never more than is held: a base that fits is not refused.
"""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from onebase_adapters.errors import BaseModelError
from onebase_engine.base.base_spec import BaseSpec
from onebase_engine.base.coded_checkpoint import tensor_files
from onebase_engine.kernels.device import free_memory

_LAYER = re.compile(r"\.\d+\.")
_SIZES = {"I8": 1, "U8": 1, "F8_E4M3": 1, "I16": 2, "I32": 4, "I64": 8, "F32": 4}
"""Bytes of a number that is kept as it is: codes, and their scales. All others are held in bfloat16."""
_SCALES = ("scales", "offsets", "weight_scale")
_BESIDE_CODES = re.compile(
    r"(values|qzeros|g_idx|weight_(zero_point|g_idx|shape)|quant_map|nested_absmax|quant_state\..*)$"
)
"""What a checkpoint has beside its codes, and what may not be held, or in another form."""
_HEADS = ("lm_head.", "embed_out.", "cls.")
_COPIES = ("encoder.embed_tokens.", "decoder.embed_tokens.")
"""T5's, of its one embedding."""
_BLOCK, _BLOCKS = 64, 256
"""Weights of one scale; and, with double quantisation, scales of one scale of their own."""


def check_memory(folder: Path, config: Any, spec: BaseSpec, device: torch.device, *, coded: bool) -> None:
    """Raises BaseModelError, with both numbers, if the device has less memory free than the base will take.

    `coded`: its linear weights are in 4 bits already.
    """
    needed = base_bytes(folder, config, spec, coded=coded)
    refuse_beyond(device, needed, f"Loading {spec.model!r}" + _held(spec, coded), plain=spec.quantization == "none")


def _held(spec: BaseSpec, coded: bool) -> str:
    if coded:
        return " as it is"
    return " in bfloat16" if spec.quantization == "none" else f" in {spec.quantization}"


def refuse_beyond(device: torch.device, needed: int, what: str, *, plain: bool = False) -> None:
    """Raises BaseModelError if so many bytes are not free."""
    free = free_memory(device)
    if needed > free:
        smaller = "hold it in 4 bits (--quantization nf4), " if plain else ""
        raise BaseModelError(
            f"{what} takes {needed / 2**30:.2f} GiB of memory, and {device} has {free / 2**30:.2f} GiB free: "
            f"{smaller}choose a smaller base, or free memory.",
            field="model",
        )


def base_bytes(folder: Path, config: Any, spec: BaseSpec, *, coded: bool) -> int:
    """Bytes of a base's weights as they will be held; 0 where no safetensors tell."""
    if not any(folder.glob("*.safetensors")):
        return 0
    four_bits = spec.quantization != "none" and not coded
    total = 0
    for name, kind, shape in _tensors(folder):
        copied = name.startswith(_COPIES) or (config.tie_word_embeddings and name.startswith(_HEADS))
        if copied or _BESIDE_CODES.search(name) or len(shape) > 3:  # old files hold masks, which nobody reads
            continue
        count = math.prod(shape)
        if four_bits and len(shape) == 2 and name.endswith(".weight") and _LAYER.search(name):
            total += _in_four_bits(count, double=spec.double_quant)
        elif kind == "F32" and not (coded and name.endswith(_SCALES)):
            total += 2 * count
        else:
            total += _SIZES.get(kind, 2) * count
    return total


def _in_four_bits(count: int, *, double: bool) -> int:
    """Bytes of so many weights in NF4 or FP4, their scales included."""
    scales = -(-count // _BLOCK)
    return count // 2 + (scales + 4 * (scales // _BLOCKS) if double else 4 * scales)


def _tensors(folder: Path) -> Iterator[tuple[str, str, list[int]]]:
    """Name, kind of number and shape of each tensor."""
    from safetensors import safe_open

    files = tensor_files(folder)
    for path in sorted({*files.values()}):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118  # it is no mapping
                part = file.get_slice(name)
                yield name, part.get_dtype(), part.get_shape()
