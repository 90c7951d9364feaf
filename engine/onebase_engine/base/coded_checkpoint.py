"""Loading a checkpoint whose linear weights are 4-bit codes already: GPTQ, AWQ and compressed-tensors.

The codes are served as they are in the file. Each layout is a function from a module's tensors to a `CodedWeight`;
what is no linear weight, or was left out of the quantisation, is loaded as bfloat16.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from math import gcd
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from onebase_adapters.errors import BaseModelError
from onebase_engine.kernels.coded_linear import CodedLinear, CodedWeight

_VALUES = torch.arange(-8, 8, dtype=torch.float32)
"""The values of unsigned codes with a zero point of 8."""
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight output features is at each nibble of AWQ's words, from the lowest."""

Tensors = Mapping[str, torch.Tensor]
"""A module's, by the names behind its own."""


@dataclass(frozen=True)
class Layout:
    """How a tool writes 4-bit weights."""

    name: str
    """For people: the tool's own name, and the size of a group."""
    weight: str
    """The tensor that a quantised module has, behind its name."""
    read: Callable[[Tensors], CodedWeight]


def layout_of(config: Mapping[str, Any]) -> Layout:
    """By a model's `quantization_config`. Raises BaseModelError for one that is not read here."""
    method = str(config.get("quant_method", "")).lower()
    if method == "onebase":
        return Layout(config["name"], "codes", _read_own)
    refused = _refused_setting(method, config)
    if refused is not None:
        raise BaseModelError(
            f"The base is quantised by {method or 'an unnamed method'} ({refused}), which is not read here. Read "
            "are weights in 4 bits by gptq, awq (gemm), compressed-tensors (pack-quantized) or bitsandbytes, and "
            "plain ones.",
            field="model",
        )
    if method == "gptq":
        size, first = config["group_size"], 0 if config.get("checkpoint_format") == "gptq_v2" else 1
        return Layout(f"GPTQ {_group(size)}", "qweight", partial(_read_gptq, size=size, first=first))
    if method == "awq":
        size = config["group_size"]
        return Layout(f"AWQ {_group(size)}", "qweight", partial(_read_awq, size=size))
    size = next(iter(config["config_groups"].values()))["weights"].get("group_size") or -1
    return Layout(f"compressed-tensors {_group(size)}", "weight_packed", partial(_read_compressed, size=size))


def _refused_setting(method: str, config: Mapping[str, Any]) -> str | None:
    """What about the configuration is not read here."""
    if method in ("gptq", "awq"):
        if config.get("bits", config.get("w_bit", 4)) != 4:
            return f"{config.get('bits', config.get('w_bit'))} bits"
        version = config.get("version", "gemm") if method == "awq" else "gemm"
        return None if str(version).lower() == "gemm" else f"version {version}"
    if method == "compressed-tensors":
        groups = list(config.get("config_groups", {}).values())
        formats = {group.get("format") or config.get("format") for group in groups}
        if len(groups) != 1 or formats != {"pack-quantized"}:
            return f"format {', '.join(sorted(map(str, formats))) or 'without groups'}"
        weights = groups[0]["weights"]
        if weights.get("num_bits") != 4 or weights.get("type") != "int":
            return f"{weights.get('type')} of {weights.get('num_bits')} bits"
        return "activations are quantised, too" if groups[0].get("input_activations") else None
    return "another method"


def _group(size: int) -> str:
    return "in 4 bits" if size <= 0 else f"in 4 bits, groups of {size}"


def load_coded(folder: Path, layout: Layout, make: Callable[[], Any], device: torch.device) -> Any:
    """The model that `make` makes without weights, with those of the folder. Raises BaseModelError."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        model = make()
    files = tensor_files(folder)
    reader = _Reader(files)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and f"{name}.{layout.weight}" in files:
            model.set_submodule(name, _coded_linear(name, module, layout, reader, device))
    state = {
        name: reader(name).to(device, torch.bfloat16)
        for name, parameter in model.named_parameters()
        if name in files and parameter.is_meta
    }
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    lacking = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if lacking:
        names = ", ".join(lacking[:3]) + (", ..." if len(lacking) > 3 else "")
        raise BaseModelError(f"{folder} has no weights for {names} ({len(lacking)} in all).", field="model")
    return model.to(device)


def _coded_linear(
    name: str, module: nn.Linear, layout: Layout, reader: "_Reader", device: torch.device
) -> CodedLinear:
    tensors = reader.below(name)
    try:
        weight = layout.read(tensors)
    except (KeyError, RuntimeError, ValueError) as error:
        raise BaseModelError(
            f"The weight of {name} cannot be read as {layout.name}: {error}", field="model"
        ) from error
    wanted = (module.out_features, module.in_features)
    if weight.shape != wanted:
        raise BaseModelError(
            f"The weight of {name} is {weight.shape}, but by config.json it is {wanted}.", field="model"
        )
    bias = tensors.get("bias")
    return CodedLinear(weight.to(device), None if bias is None else bias.to(device, torch.bfloat16))


def tensor_files(folder: Path) -> dict[str, Path]:
    """Where each tensor is. Raises BaseModelError."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = {name: folder / file for name, file in json.loads(index.read_text())["weight_map"].items()}
        absent = sorted({file.name for file in names.values() if not file.is_file()})
        if absent:
            raise BaseModelError(f"{folder} lacks {', '.join(absent)}, which its index names.", field="model")
        return names
    found: dict[str, Path] = {}
    whole = folder / "model.safetensors"
    # Some hold the same weights a second time, under the names of another program.
    for path in [whole] if whole.is_file() else sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= dict.fromkeys(file.keys(), path)
    if not found:
        raise BaseModelError(f"{folder} holds no .safetensors files.", field="model")
    return found


class _Reader:
    """Tensors by name, each file opened once."""

    def __init__(self, files: Mapping[str, Path]) -> None:
        self._files = files
        self._open: dict[Path, Any] = {}
        self._names: dict[str, list[str]] = {}
        for name in files:
            module, _, last = name.rpartition(".")
            self._names.setdefault(module, []).append(last)

    def __call__(self, name: str) -> torch.Tensor:
        path = self._files[name]
        if path not in self._open:
            self._open[path] = safe_open(path, "pt")
        tensor: torch.Tensor = self._open[path].get_tensor(name)
        return tensor

    def below(self, module: str) -> dict[str, torch.Tensor]:
        """All of a module's."""
        return {last: self(f"{module}.{last}") for last in self._names[module]}


def _read_own(tensors: Tensors) -> CodedWeight:
    """A GGUF file's, see `gguf_file`."""
    return CodedWeight(tensors["codes"], tensors["values"], tensors["scales"], tensors.get("offsets"))


def _read_gptq(tensors: Tensors, *, size: int, first: int) -> CodedWeight:
    """AutoGPTQ's: words of eight inputs, [in / 8, out]; zero points, from `first` on, [groups, out / 8]."""
    codes = _nibbles(tensors["qweight"].T)
    zeros = _nibbles(tensors["qzeros"]) + first
    groups = tensors.get("g_idx")
    return _coded(codes, tensors["scales"], zeros, groups, size)


def _read_awq(tensors: Tensors, *, size: int) -> CodedWeight:
    """AutoAWQ's "gemm": words of eight outputs in an order of their own, [in, out / 8] and [groups, out / 8]."""
    back = torch.tensor(_AWQ_ORDER).argsort()
    codes, zeros = (
        _nibbles(tensors[name]).view(len(tensors[name]), -1, 8)[:, :, back].flatten(1)
        for name in ("qweight", "qzeros")
    )
    return _coded(codes.T, tensors["scales"], zeros, None, size)


def _read_compressed(tensors: Tensors, *, size: int) -> CodedWeight:
    """compressed-tensors' "pack-quantized": words of eight inputs, [out, in / 8]; scales [out, groups]; zero points
    in words of eight outputs, [out / 8, groups], 8 where there are none."""
    out, inputs = (int(size) for size in tensors["weight_shape"])
    codes = _nibbles(tensors["weight_packed"])[:, :inputs]
    scales = tensors["weight_scale"].T.contiguous()
    packed = tensors.get("weight_zero_point")
    zeros = torch.full(scales.shape, 8) if packed is None else _nibbles(packed.T)[:, :out]
    return _coded(codes, scales, zeros, tensors.get("weight_g_idx"), size)


def _nibbles(words: torch.Tensor) -> torch.Tensor:
    """[n, m] int32 -> [n, 8 m] int32 of the 4-bit numbers in them, from the lowest."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    return ((words[..., None] >> shifts) & 15).flatten(1)


def _coded(
    codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, groups: torch.Tensor | None, size: int
) -> CodedWeight:
    """(code - zero) * scale, by codes [out, in], scales and zero points [groups, out], and the group of each input;
    without `groups` each `size` inputs make one, or all (-1)."""
    inputs = codes.shape[1]
    size = inputs if size <= 0 else size
    if len(scales) != -(-inputs // size):
        raise ValueError(f"{len(scales)} groups of {size} are not {inputs} inputs")
    order = None
    if groups is not None and bool((groups != torch.arange(inputs) // size).any()):
        counts = torch.bincount(groups, minlength=len(scales))
        if bool((counts != size).any()):
            raise ValueError(f"its groups are not all of {size} inputs")
        order = groups.argsort(stable=True)
        codes = codes[:, order]
    block = gcd(size, inputs)
    if block < size:  # the last group is smaller: smaller blocks, some of one scale
        owner = torch.arange(0, inputs, block) // size
        scales, zeros = scales[owner], zeros[owner]
    packed = (codes[:, 0::2] << 4 | codes[:, 1::2]).to(torch.uint8).contiguous()
    symmetric = bool((zeros == 8).all())
    held = (scales if scales.dtype == torch.float16 else scales.float()).contiguous()
    return CodedWeight(packed, _VALUES, held, None if symmetric else (8 - zeros).to(torch.int8).contiguous(), order)
