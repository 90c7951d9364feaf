"""Tiny models as quantisers write them, packed number by number as each tool's own code does, with the same weights
as plain numbers beside them for an oracle."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import load_file, save_file

from support.tokenizer import EOS, TEMPLATE

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
    "gptq-8-bits": {"quant_method": "gptq", "bits": 8, "group_size": 32, "sym": True, "desc_act": False},
    "gptq-8-bits-asymmetric": {"quant_method": "gptq", "bits": 8, "group_size": 32, "sym": False},
    "compressed-8-bits": {"quant_method": "compressed-tensors", "bits": 8, "group_size": 32, "symmetric": True},
    "compressed-int8": {
        "quant_method": "compressed-tensors", "bits": 8, "group_size": None, "symmetric": True,
        "format": "int-quantized",
    },
    "compressed-float8": {
        "quant_method": "compressed-tensors", "bits": 8, "group_size": None, "symmetric": True,
        "format": "float-quantized", "type": "float",
    },
    "fp8-blocks": {"quant_method": "fp8", "bits": 8, "weight_block_size": [32, 48]},
    "fp8-whole": {"quant_method": "fp8", "bits": 8},
    "bitsandbytes-8-bits": {"quant_method": "bitsandbytes", "bits": 8, "load_in_8bit": True, "load_in_4bit": False},
}  # fmt: skip


@dataclass(frozen=True)
class _Rounded:
    codes: np.ndarray
    """[in, out], 0 to 15 or to 255."""
    scales: np.ndarray
    """[groups, out] float16."""
    zeros: np.ndarray
    """[groups, out]."""
    groups: np.ndarray
    """[in], each input's."""
    bits: int

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
            del coded[name]
            if settings["quant_method"] in ("fp8", "bitsandbytes") or "format" in settings:
                exact[name], parts = _numbers(weight.float(), settings)
            else:
                rounded = _round(weight.float().numpy(), settings, seed=len(name))
                exact[name] = rounded.values()
                parts = {last: torch.from_numpy(value) for last, value in _packed(rounded, settings).items()}
            coded |= {f"{name.removesuffix('.weight')}.{last}": value for last, value in parts.items()}
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
        "num_bits": settings.get("bits", 4), "type": settings.get("type", "int"), "group_size": group,
        "symmetric": settings["symmetric"], "strategy": "group" if group else "channel",
    }  # fmt: skip
    form = settings.get("format", "pack-quantized")
    one = {"targets": ["Linear"], "weights": weights, "format": form}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": one}}


def _numbers(weight: torch.Tensor, settings: dict[str, Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """A weight [out, in] in numbers of 8 bits: what they stand for, and the tensors of the file."""
    rows, size = settings.get("weight_block_size", (1, weight.shape[1]))
    if settings["quant_method"] == "fp8" and "weight_block_size" not in settings:
        rows = len(weight)
    floats = settings["quant_method"] == "fp8" or settings.get("type") == "float"
    most = 448 if floats else 127
    blocks = [part.split(size, 1) for part in weight.split(rows)]
    scales = torch.stack([torch.stack([part.abs().max() / most for part in row]) for row in blocks])
    spread = scales.repeat_interleave(rows, 0)[: len(weight)].repeat_interleave(size, 1)[:, : weight.shape[1]]
    codes = (weight / spread).to(torch.float8_e4m3fn) if floats else (weight / spread).round().to(torch.int8)
    match settings["quant_method"]:
        case "bitsandbytes":
            stored = (scales[:, 0] * 127).float()
            return codes.float() * (stored / 127)[:, None], {"weight": codes, "SCB": stored}
        case "fp8":
            held = scales if "weight_block_size" in settings else scales.reshape(())
            return codes.float() * spread, {"weight": codes, "weight_scale_inv": held}
    scales = scales.bfloat16()
    return codes.float() * scales.float(), {"weight": codes, "weight_scale": scales}


def _round(weight: np.ndarray, settings: dict[str, Any], seed: int) -> _Rounded:
    """To the nearest."""
    out, inputs = weight.shape
    size = settings["group_size"] or -1
    size = inputs if size == -1 else size
    groups = np.arange(inputs) // size
    if settings.get("desc_act"):
        groups = np.random.default_rng(seed).permutation(groups)
    symmetric = settings.get("sym", settings.get("symmetric", False))
    count, bits = groups.max() + 1, settings.get("bits", 4)
    most, middle = (1 << bits) - 1, 1 << bits - 1
    scales, zeros = np.empty((count, out), np.float16), np.full((count, out), middle)
    for group in range(count):
        part = weight[:, groups == group]
        if symmetric:
            scales[group] = np.abs(part).max(1) / (middle - 1)
        else:
            low, high = np.minimum(part.min(1), 0), np.maximum(part.max(1), 0)
            scales[group] = (high - low) / most
            zeros[group] = np.clip(np.round(-low / scales[group].astype(np.float32)), 1, most)
    steps = np.round(weight.T / scales.astype(np.float32)[groups]) + zeros[groups]
    return _Rounded(np.clip(steps, 0, most).astype(np.uint32), scales, zeros.astype(np.uint32), groups, bits)


def _packed(rounded: _Rounded, settings: dict[str, Any]) -> dict[str, np.ndarray]:
    match settings["quant_method"]:
        case "gptq":
            stored = rounded.zeros - (0 if settings.get("checkpoint_format") == "gptq_v2" else 1)
            return {
                "qweight": _words(rounded.codes.T, rounded.bits).T,
                "qzeros": _words(stored, rounded.bits),
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
        "weight_packed": _words(rounded.codes.T, rounded.bits),
        "weight_scale": rounded.scales.T,
        "weight_shape": np.array(rounded.codes.T.shape, np.int64),
    }
    if not settings["symmetric"]:
        found["weight_zero_point"] = _words(rounded.zeros, rounded.bits).T
    return {name: np.ascontiguousarray(value) for name, value in found.items()}


def _reordered(values: np.ndarray) -> np.ndarray:
    """Eight by eight columns, as AWQ's nibbles have them."""
    return values.reshape(len(values), -1, 8)[:, :, [0, 2, 4, 6, 1, 3, 5, 7]].reshape(values.shape)


def _words(values: np.ndarray, bits: int = 4) -> np.ndarray:
    """[n, m] of so many bits to [n, m * bits / 32] int32, the first lowest."""
    each = 32 // bits
    words = np.zeros((len(values), -(-values.shape[1] // each)), np.uint32)
    for column in range(values.shape[1]):
        words[:, column // each] |= values[:, column].astype(np.uint32) << np.uint32(bits * (column % each))
    return words.view(np.int32)


def save_gguf(
    source: Path,
    target: Path,
    kind: str,
    *,
    extra: str = "",
    setting: tuple[str, str | int] | None = None,
    leave_out: str = "",
) -> dict[str, torch.Tensor]:
    """Write the model in `source` as llama.cpp's converter does, its layers' matrices in `kind` (Q4_0, Q8_0, ...);
    gives what each parameter stands for then, by transformers' names. With one tensor or setting more, or a tensor
    less."""
    config = json.loads((source / "config.json").read_text())
    family = {"gemma3_text": "gemma3", "mistral": "llama"}.get(config["model_type"], config["model_type"])
    writer = gguf.GGUFWriter(target, family)
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    dim = config.get("head_dim") or config["hidden_size"] // heads
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(dim)
    writer.add_value_length(dim)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_rope_dimension_count(dim)
    _add_tokenizer(writer, source, config["vocab_size"])
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, family.upper()), config["num_hidden_layers"])
    expected = {}
    for name, value in load_file(source / "model.safetensors").items():
        module, _, last = name.rpartition(".")
        held = value.float().numpy()
        if family == "gemma3" and name.endswith("norm.weight"):
            held = held + 1  # as it is multiplied with
        count = {"q_proj": heads, "k_proj": kv_heads}.get(module.rpartition(".")[2])
        if family == "llama" and count is not None:  # rotations of neighbours, where transformers has halves
            held = held.reshape(count, 2, len(held) // count // 2, -1).swapaxes(1, 2).reshape(held.shape)
        form = gguf.GGMLQuantizationType[kind if value.dim() == 2 and ".layers." in name else "F32"]
        data = gguf.quants.quantize(np.ascontiguousarray(held), form)
        if f"{names.get_name(module)}.{last}" != leave_out:
            writer.add_tensor(f"{names.get_name(module)}.{last}", data, raw_dtype=form)
        back = gguf.quants.dequantize(data, form).reshape(held.shape)
        if family == "llama" and count is not None:
            back = back.reshape(count, len(held) // count // 2, 2, -1).swapaxes(1, 2).reshape(held.shape)
        if family == "gemma3" and name.endswith("norm.weight"):
            back = back - 1
        expected[name] = torch.from_numpy(back.copy())
    if extra:
        writer.add_tensor(extra, np.ones(4, np.float32))
    if setting is not None:
        add = writer.add_string if isinstance(setting[1], str) else writer.add_uint32
        add(f"{family}.{setting[0]}", setting[1])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


def _add_tokenizer(writer: Any, source: Path, vocab: int) -> None:
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    ids = tokenizer["model"]["vocab"] | {added["content"]: added["id"] for added in tokenizer["added_tokens"]}
    tokens = sorted(ids, key=lambda token: ids[token])
    tokens += [f"[unused{number}]" for number in range(vocab - len(tokens))]
    special = {added["content"] for added in tokenizer["added_tokens"]}
    control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([control if token in special else normal for token in tokens])
    merges = tokenizer["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    writer.add_eos_token_id(EOS)
    writer.add_chat_template(TEMPLATE)
