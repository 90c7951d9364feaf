"""Tiny models as quantisers write them, packed number by number as each tool's own code does, with the same weights
as plain numbers beside them for an oracle."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

LAYOUTS: dict[str, dict[str, Any]] = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False},
    "gptq-asymmetric": {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False, "desc_act": False},
    "gptq-v2": {
        "quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False, "desc_act": False,
        "checkpoint_format": "gptq_v2",
    },
    "gptq-act-order": {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": True},
    "gptq-a-smaller-last-group": {"quant_method": "gptq", "bits": 4, "group_size": 48, "sym": True},
    "gptq-one-group": {"quant_method": "gptq", "bits": 4, "group_size": -1, "sym": True},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True, "version": "gemm"},
    "compressed": {"quant_method": "compressed-tensors", "group_size": 32, "symmetric": True},
    "compressed-asymmetric": {"quant_method": "compressed-tensors", "group_size": 32, "symmetric": False},
    "compressed-by-channel": {"quant_method": "compressed-tensors", "group_size": None, "symmetric": True},
}  # fmt: skip


@dataclass(frozen=True)
class _Rounded:
    codes: np.ndarray
    """[in, out], 0 to 15."""
    scales: np.ndarray
    """[groups, out] float16."""
    zeros: np.ndarray
    """[groups, out]."""
    groups: np.ndarray
    """[in], each input's."""

    def values(self) -> torch.Tensor:
        """[out, in] float32."""
        steps = self.codes.astype(np.int64) - self.zeros[self.groups]
        return torch.from_numpy((steps * self.scales.astype(np.float32)[self.groups]).T.copy())


def quantise(source: Path, target: Path, layout: str) -> tuple[Path, Path]:
    """Folders of the model in `source` as the layout has it, and with the same weights in float32."""
    settings = LAYOUTS[layout]
    plain = target.with_name(f"{target.name}-plain")
    for folder in (target, plain):
        shutil.copytree(source, folder)
    tensors = load_file(source / "model.safetensors")
    coded, exact = dict(tensors), dict(tensors)
    for name, weight in tensors.items():
        if weight.dim() == 2 and ".layers." in name:
            rounded = _round(weight.float().numpy(), settings, seed=len(name))
            del coded[name]
            exact[name] = rounded.values()
            for last, value in _packed(rounded, settings).items():
                coded[f"{name.removesuffix('.weight')}.{last}"] = torch.from_numpy(value)
    for folder, held in ((target, coded), (plain, exact)):
        save_file({name: value.contiguous() for name, value in held.items()}, folder / "model.safetensors")
    config = json.loads((target / "config.json").read_text())
    config["quantization_config"] = _described(settings)
    (target / "config.json").write_text(json.dumps(config))
    return target, plain


def _described(settings: dict[str, Any]) -> dict[str, Any]:
    if settings["quant_method"] != "compressed-tensors":
        return settings
    group = settings["group_size"]
    weights = {
        "num_bits": 4, "type": "int", "symmetric": settings["symmetric"], "group_size": group,
        "strategy": "group" if group else "channel",
    }  # fmt: skip
    one = {"targets": ["Linear"], "weights": weights, "format": "pack-quantized"}
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": one}}


def _round(weight: np.ndarray, settings: dict[str, Any], seed: int) -> _Rounded:
    """To the nearest."""
    out, inputs = weight.shape
    size = settings["group_size"] or -1
    size = inputs if size == -1 else size
    groups = np.arange(inputs) // size
    if settings.get("desc_act"):
        groups = np.random.default_rng(seed).permutation(groups)
    symmetric = settings.get("sym", settings.get("symmetric", False))
    count = groups.max() + 1
    scales, zeros = np.empty((count, out), np.float16), np.full((count, out), 8)
    for group in range(count):
        part = weight[:, groups == group]
        if symmetric:
            scales[group] = np.abs(part).max(1) / 7
        else:
            low, high = np.minimum(part.min(1), 0), np.maximum(part.max(1), 0)
            scales[group] = (high - low) / 15
            zeros[group] = np.clip(np.round(-low / scales[group].astype(np.float32)), 1, 15)
    steps = np.round(weight.T / scales.astype(np.float32)[groups]) + zeros[groups]
    return _Rounded(np.clip(steps, 0, 15).astype(np.uint32), scales, zeros.astype(np.uint32), groups)


def _packed(rounded: _Rounded, settings: dict[str, Any]) -> dict[str, np.ndarray]:
    match settings["quant_method"]:
        case "gptq":
            stored = rounded.zeros - (0 if settings.get("checkpoint_format") == "gptq_v2" else 1)
            return {
                "qweight": _words(rounded.codes.T).T,
                "qzeros": _words(stored),
                "scales": rounded.scales,
                "g_idx": rounded.groups.astype(np.int32),
            }
        case "awq":
            return {
                "qweight": _words(_reordered(rounded.codes)),
                "qzeros": _words(_reordered(rounded.zeros)),
                "scales": rounded.scales,
            }
    found = {
        "weight_packed": _words(rounded.codes.T),
        "weight_scale": rounded.scales.T,
        "weight_shape": np.array(rounded.codes.T.shape, np.int64),
    }
    if not settings["symmetric"]:
        found["weight_zero_point"] = _words(rounded.zeros.T.T).T
    return {name: np.ascontiguousarray(value) for name, value in found.items()}


def _reordered(values: np.ndarray) -> np.ndarray:
    """Eight by eight columns, as AWQ's nibbles have them."""
    return values.reshape(len(values), -1, 8)[:, :, [0, 2, 4, 6, 1, 3, 5, 7]].reshape(values.shape)


def _words(values: np.ndarray) -> np.ndarray:
    """[n, m] of 4 bits to [n, m / 8] int32, the first lowest."""
    words = np.zeros((len(values), -(-values.shape[1] // 8)), np.uint32)
    for column in range(values.shape[1]):
        words[:, column // 8] |= values[:, column].astype(np.uint32) << np.uint32(4 * (column % 8))
    return words.view(np.int32)
