"""Loading a checkpoint whose linear weights are codes already: GPTQ, AWQ, compressed-tensors, FP8 and LLM.int8.

The codes are served as they are in the file. Each layout is a function from a module's tensors to a `CodedWeight`;
what is no linear weight, or was left out of the quantisation, is loaded as bfloat16. Where a tool would round
activations, too, they stay in bfloat16.
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
"""The values of unsigned 4-bit codes with a zero point of 8."""
_NO_VALUES = torch.empty(0)
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight output features is at each nibble of AWQ's words, from the lowest."""

Tensors = Mapping[str, torch.Tensor]
"""A module's, by the names behind its own."""


@dataclass(frozen=True)
class Layout:
    """How a tool writes weights."""

    name: str
    """For people: the tool's own name, and the size of a group."""
    mark: str
    """A tensor that only a quantised module has, behind its name."""
    read: Callable[[Tensors], CodedWeight]


def layout_of(config: Mapping[str, Any]) -> Layout:
    """By a model's `quantization_config`. Raises BaseModelError for one that is not read here."""
    method = str(config.get("quant_method", "")).lower()
    found = _BY_METHOD[method](config) if method in _BY_METHOD else "another method"
    if isinstance(found, Layout):
        return found
    raise BaseModelError(
        f"The base is quantised by {method or 'an unnamed method'} ({found}), which is not read here. Read are "
        "weights in 4 or 8 bits by gptq, compressed-tensors or bitsandbytes, in 4 bits by awq (gemm), in 8 bits by "
        "fp8, and plain ones.",
        field="model",
    )


def _gptq(config: Mapping[str, Any]) -> Layout | str:
    bits, size = config.get("bits", 4), config["group_size"]
    if bits not in (4, 8):
        return f"{bits} bits"
    first = 0 if config.get("checkpoint_format") == "gptq_v2" else 1
    read = partial(_read_gptq, bits=bits, size=size, first=first)
    return Layout(f"GPTQ {_group(bits, size)}", "qweight", read)


def _awq(config: Mapping[str, Any]) -> Layout | str:
    bits, version = config.get("bits", config.get("w_bit", 4)), str(config.get("version", "gemm"))
    if bits != 4:
        return f"{bits} bits"
    if version.lower() != "gemm":
        return f"version {version}"
    size = config["group_size"]
    return Layout(f"AWQ {_group(4, size)}", "qweight", partial(_read_awq, size=size))


def _compressed(config: Mapping[str, Any]) -> Layout | str:
    groups = list(config.get("config_groups", {}).values())
    formats = {str(group.get("format") or config.get("format")) for group in groups}
    if len(groups) != 1:
        return f"format {', '.join(sorted(formats)) or 'without groups'}"
    (kind,), weights = formats, groups[0]["weights"]
    bits, size = weights.get("num_bits"), weights.get("group_size") or -1
    name = f"compressed-tensors {_group(bits, size)}"
    match kind, weights.get("type"), bits:
        case "pack-quantized", "int", 4 | 8:
            return Layout(name, "weight_packed", partial(_read_compressed, bits=bits, size=size))
        case ("int-quantized", "int", 8) | ("float-quantized", "float", 8):
            rows, size = weights.get("block_structure") or (1, size)
            return Layout(name, "weight_scale", partial(_read_numbers, scales="weight_scale", rows=rows, size=size))
    return f"format {kind}, {weights.get('type')} of {bits} bits"


def _fp8(config: Mapping[str, Any]) -> Layout | str:
    rows, size = config.get("weight_block_size") or (1, -1)
    read = partial(_read_numbers, scales="weight_scale_inv", rows=rows, size=size)
    return Layout(f"FP8 {_group(8, size)}", "weight_scale_inv", read)


def _bitsandbytes(config: Mapping[str, Any]) -> Layout | str:
    if not config.get("load_in_8bit"):
        return "neither 4 nor 8 bits"
    return Layout("bitsandbytes' LLM.int8", "SCB", partial(_read_numbers, scales="SCB", over=127.0))


_BY_METHOD: Mapping[str, Callable[[Mapping[str, Any]], Layout | str]] = {
    "onebase": lambda config: Layout(config["name"], "codes", _read_own),
    "gptq": _gptq,
    "awq": _awq,
    "compressed-tensors": _compressed,
    "fp8": _fp8,
    "bitsandbytes": _bitsandbytes,
}
"""The layout by a `quantization_config`, or what about it is not read here."""


def _group(bits: int, size: int) -> str:
    return f"in {bits} bits" if size <= 0 else f"in {bits} bits, groups of {size}"


def load_coded(folder: Path, layout: Layout, make: Callable[[], Any], device: torch.device) -> Any:
    """The model that `make` makes without weights, with those of the folder. Raises BaseModelError."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        model = make()
    files = tensor_files(folder)
    reader = _Reader(files)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and f"{name}.{layout.mark}" in files:
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


def _read_gptq(tensors: Tensors, *, bits: int, size: int, first: int) -> CodedWeight:
    """AutoGPTQ's: words of inputs, [in * bits / 32, out]; zero points from `first` on, in words of outputs."""
    codes = _fields(tensors["qweight"].T, bits)
    zeros = _fields(tensors["qzeros"], bits) + first
    return _coded(codes, tensors["scales"], zeros, tensors.get("g_idx"), bits, size)


def _read_awq(tensors: Tensors, *, size: int) -> CodedWeight:
    """AutoAWQ's "gemm": words of eight outputs in an order of their own, [in, out / 8] and [groups, out / 8]."""
    back = torch.tensor(_AWQ_ORDER).argsort()
    codes, zeros = (
        _fields(tensors[name], 4).view(len(tensors[name]), -1, 8)[:, :, back].flatten(1)
        for name in ("qweight", "qzeros")
    )
    return _coded(codes.T, tensors["scales"], zeros, None, 4, size)


def _read_compressed(tensors: Tensors, *, bits: int, size: int) -> CodedWeight:
    """compressed-tensors' "pack-quantized": words of inputs, [out, in * bits / 32]; scales [out, groups]; zero
    points in words of outputs, [out * bits / 32, groups], or the middle code where there are none."""
    out, inputs = (int(size) for size in tensors["weight_shape"])
    codes = _fields(tensors["weight_packed"], bits)[:, :inputs]
    scales = tensors["weight_scale"].T.contiguous()
    packed = tensors.get("weight_zero_point")
    zeros = torch.full(scales.shape, 1 << bits - 1) if packed is None else _fields(packed.T, bits)[:, :out]
    return _coded(codes, scales, zeros, tensors.get("weight_g_idx"), bits, size)


def _read_numbers(
    tensors: Tensors, *, scales: str, rows: int = 1, size: int = -1, over: float = 1.0
) -> CodedWeight:
    """Numbers of 8 bits, [out, in] int8 or float8, by a scale, `over` times as large as it is meant, for each block
    of `rows` outputs and `size` inputs (-1: all), for each output, or for all; and by zero points, if there are."""
    codes, found = tensors["weight"], tensors[scales].float() / over
    if codes.dtype not in (torch.int8, torch.float8_e4m3fn):
        raise ValueError(f"its numbers are {str(codes.dtype).removeprefix('torch.')}")
    out, inputs = codes.shape
    found = found.expand(out, 1) if found.numel() == 1 else found.view(len(found), -1)
    found = found.repeat_interleave(rows, 0)[:out] if len(found) < out else found
    (spread,) = _in_blocks(inputs, size, found.T)
    zeros = tensors.get("weight_zero_point")
    offsets = None
    if zeros is not None and bool(zeros.any()):
        (steps,) = _in_blocks(inputs, size, zeros.float().expand(out, -1).T)
        offsets = -steps * spread
    return CodedWeight(codes.contiguous(), _NO_VALUES, spread, offsets)


def _fields(words: torch.Tensor, bits: int) -> torch.Tensor:
    """[n, m] int32 -> [n, 32 / bits * m] int32 of the numbers of so many bits in them, from the lowest."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    return ((words[..., None] >> shifts) & (1 << bits) - 1).flatten(1)


def _in_blocks(inputs: int, size: int, *values: torch.Tensor) -> list[torch.Tensor]:
    """Values [groups, out] of groups of `size` inputs (-1: all) for the largest blocks that divide them and all
    inputs: the last group may be smaller."""
    size = inputs if size <= 0 else size
    for each in values:
        if len(each) != -(-inputs // size):
            raise ValueError(f"{len(each)} groups of {size} are not {inputs} inputs")
    owner = torch.arange(0, inputs, gcd(size, inputs)) // size
    return [each[owner].contiguous() for each in values]


def _coded(
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    groups: torch.Tensor | None,
    bits: int,
    size: int,
) -> CodedWeight:
    """(code - zero) * scale, by codes [out, in], scales and zero points [groups, out], and the group of each input;
    without `groups` each `size` inputs make one, or all (-1)."""
    inputs, middle, count = codes.shape[1], 1 << bits - 1, len(scales)
    scales, zeros = _in_blocks(inputs, size, scales, zeros)
    order = None
    if groups is not None and size > 0 and bool((groups != torch.arange(inputs) // size).any()):
        counts = torch.bincount(groups, minlength=count)
        if bool((counts != size).any()):
            raise ValueError(f"its groups are not all of {size} inputs")
        order = groups.argsort(stable=True)
        codes = codes[:, order]
    symmetric = bool((zeros == middle).all())
    if bits == 8:
        scales = scales.float()
        offsets = None if symmetric else (middle - zeros) * scales
        return CodedWeight((codes - middle).to(torch.int8).contiguous(), _NO_VALUES, scales, offsets, order)
    packed = (codes[:, 0::2] << 4 | codes[:, 1::2]).to(torch.uint8).contiguous()
    held = scales if scales.dtype == torch.float16 else scales.float()
    return CodedWeight(packed, _VALUES, held, None if symmetric else (middle - zeros).to(torch.int8), order)
