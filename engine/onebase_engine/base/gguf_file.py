"""A GGUF file as a folder that is loaded like any other, made once and kept in the cache.

Its linear weights of 4 to 8 bits become the codes, scales and offsets that they are: nothing is rounded. What a
file holds in other formats becomes bfloat16, and that is told; so do embeddings and norms.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf.quants import Q4_K, dequantize
from safetensors.torch import save_file
from torch import nn

from onebase_adapters.errors import BaseModelError
from onebase_engine.base.families import FAMILIES
from onebase_engine.base.gguf_tokenizer import read_gguf_tokenizer
from onebase_engine.base.needed_memory import refuse_beyond
from onebase_engine.base.package_files import Progress
from onebase_engine.kernels.coded_linear import CodedWeight

_SIGNED = torch.arange(-8, 8, dtype=torch.float32)
_UNSIGNED = torch.arange(16, dtype=torch.float32)
_NONE = torch.empty(0)
ARCHITECTURES = {family.gguf: gguf.MODEL_ARCH[family.gguf.upper()] for family in FAMILIES.values() if family.gguf}
"""Those whose tensors are known to be transformers' own, but for what `rows_of` and `added_to` undo."""
_SETTINGS = {
    *("block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size"),
    *("attention.head_count", "attention.head_count_kv", "attention.layer_norm_rms_epsilon"),
    *("attention.key_length", "attention.value_length", "rope.dimension_count", "rope.freq_base"),
}
"""The settings that end up in the configuration. Any other one would be lost without a word."""
_HALF, _LOW = 4, 15
_LAYERS_OF_27B = 62


def convert_gguf(file: Path, target: Path, progress: Progress) -> None:
    """Write the folder. Raises BaseModelError for a file that is damaged, or whose architecture is not read."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    tensors, settings = _read(file)
    refuse_beyond(torch.device("cpu"), _converted_bytes(tensors.values()), f"Reading {file.name}")
    architecture = settings["architecture"]
    place = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    config = AutoConfig.from_pretrained(**place)
    config.tie_word_embeddings = "output.weight" not in tensors
    if "attention.key_length" in settings:
        config.head_dim = settings["attention.key_length"]
    if hasattr(config, "sliding_window"):
        config.sliding_window = settings.get("attention.sliding_window")
    if hasattr(config, "query_pre_attn_scalar"):
        config.query_pre_attn_scalar = _query_scale(config)
    if config.pad_token_id is not None and config.pad_token_id >= config.vocab_size:
        config.pad_token_id = None  # a default of the class
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config)
    names = gguf.get_tensor_name_map(ARCHITECTURES[architecture], config.num_hidden_layers)
    written: dict[str, torch.Tensor] = {}
    kinds: Counter[str] = Counter()
    for name, _ in model.named_parameters():
        module, _, last = name.rpartition(".")
        if module == "lm_head" and config.tie_word_embeddings:
            continue
        tensor = tensors.pop(f"{names.get_name(module)}.{last}", None)
        if tensor is None:
            raise BaseModelError(f"{file} has no tensor for {name}.", field="model")
        rows = rows_of(name, config, architecture)
        kind = tensor.tensor_type.name
        if ".layers." in name and last == "weight" and isinstance(model.get_submodule(module), nn.Linear):
            kinds[kind] += 1
            if kind in _READERS:
                parts = _parts(_READERS[kind](tensor.data), rows)
                written |= {f"{module}.{part}": value for part, value in parts.items()}
                continue
        dense = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type) - added_to(name, architecture))
        written[name] = dense.view(*reversed(tensor.shape.tolist()))[rows].to(torch.bfloat16).contiguous()
    if tensors:
        raise BaseModelError(
            f"{file} holds {min(tensors)}, which {type(model).__name__} has no place for: give the model's own "
            "safetensors folder instead.",
            field="model",
        )
    held = _described(kinds)
    progress(f"{file.name}: {held}")
    config.quantization_config = {"quant_method": "onebase", "name": held}
    save_file(written, target / "model.safetensors", {"format": "pt"})
    config.save_pretrained(target)
    read_gguf_tokenizer(file).save_pretrained(target)


def _converted_bytes(tensors: Iterable[Any]) -> int:
    """At least what the tensors take once they are converted, which is all of them at once."""
    total = 0
    for tensor in tensors:
        kind, count = tensor.tensor_type.name, int(tensor.n_elements)
        if kind in _READERS and len(tensor.shape) == 2 and tensor.name.startswith("blk."):
            total += int(tensor.n_bytes) if kind.startswith("Q4") else count
        else:
            total += 2 * count
    return total


def _parts(coded: CodedWeight, rows: Any) -> dict[str, torch.Tensor]:
    """A weight's tensors, its rows in another order."""
    parts = {"codes": coded.codes[rows], "values": coded.values.clone(), "scales": coded.scales[:, rows]}
    if coded.offsets is not None:
        parts["offsets"] = coded.offsets[:, rows]
    return {name: value.contiguous() for name, value in parts.items()}


def _described(kinds: Counter[str]) -> str:
    """How many linear weights are of which kind, for people."""
    told = [(count, kind + ("" if kind in _READERS else " as bfloat16")) for kind, count in kinds.most_common()]
    if len(told) == 1:
        return f"GGUF {told[0][1]}"
    return f"GGUF ({', '.join(f'{count} {kind}' for count, kind in told)})"


def _read(file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tensors by name, and the architecture's settings, its name among them."""
    try:
        reader = gguf.GGUFReader(file)
        architecture = str(reader.fields["general.architecture"].contents())
    except (ValueError, KeyError, IndexError, OSError) as error:
        raise BaseModelError(f"{file} is no whole GGUF file: {error}.", field="model") from error
    if architecture not in ARCHITECTURES:
        raise BaseModelError(
            f"{file} is of the architecture {architecture!r}, whose tensors are not read here: "
            f"{', '.join(ARCHITECTURES)} are.",
            field="model",
        )
    settings = {
        name.removeprefix(f"{architecture}."): field.contents()
        for name, field in reader.fields.items()
        if name.startswith(f"{architecture}.")
    }
    allowed = _SETTINGS | ({"attention.sliding_window"} if architecture != "llama" else set())
    if settings.get("rope.scaling.type") == "none":
        del settings["rope.scaling.type"]
    if unknown := settings.keys() - allowed:
        raise BaseModelError(
            f"{file} has {architecture}.{min(unknown)} = {settings[min(unknown)]}, which is not read here: give "
            "the model's own safetensors folder instead.",
            field="model",
        )
    return {tensor.name: tensor for tensor in reader.tensors}, {"architecture": architecture, **settings}


def rows_of(name: str, config: Any, architecture: str) -> Any:
    """Which row of a file's tensor each of transformers' is: llama.cpp turns neighbours where transformers turns
    halves of a head."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    found = next((count for part, count in heads.items() if f".{part}." in name), None)
    if architecture != "llama" or found is None:
        return slice(None)
    width = (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads) * found
    return torch.arange(width).view(found, -1, 2).transpose(1, 2).flatten()


def _query_scale(config: Any) -> int:
    """What queries are divided by the root of, which no file tells: llama.cpp knows Gemma 3's 27B by its layers."""
    width: int = config.hidden_size // config.num_attention_heads
    return width if config.num_hidden_layers == _LAYERS_OF_27B else config.head_dim


def added_to(name: str, architecture: str) -> int:
    """What llama.cpp adds to a norm's weights, which transformers adds itself."""
    return int(architecture == "gemma3" and name.endswith("norm.weight"))


def _weight(
    codes: torch.Tensor, values: torch.Tensor, scales: np.ndarray, offsets: np.ndarray | None
) -> CodedWeight:
    """By codes as `CodedWeight` has them, scales and offsets [out, blocks]."""
    return CodedWeight(
        codes, values, torch.from_numpy(scales).T, None if offsets is None else torch.from_numpy(offsets).T
    )


def _coded(codes: np.ndarray, values: torch.Tensor, scales: np.ndarray, offsets: np.ndarray | None) -> CodedWeight:
    """By codes of 4 bits [out, blocks, block]."""
    flat = codes.reshape(len(codes), -1)
    return _weight(torch.from_numpy(flat[:, 0::2] << _HALF | flat[:, 1::2]), values, scales, offsets)


def _wide(codes: np.ndarray, scales: np.ndarray, offsets: np.ndarray | None = None) -> CodedWeight:
    """By numbers of 8 bits [out, blocks, block]."""
    flat = np.ascontiguousarray(codes.reshape(len(codes), -1)).astype(np.int8)
    return _weight(torch.from_numpy(flat), _NONE, scales, offsets)


def _scaled(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scales and offsets [out, blocks of 32], float32, of blocks of 256 that begin with a scale of eight 6-bit
    scales, one of eight 6-bit offsets, and those in 12 bytes."""
    steps, lows = Q4_K.get_scale_min(blocks[..., 4:16].reshape(-1, 12))
    shape = (*blocks.shape[:2], 8)
    scale, offset = (_numbers(blocks[..., at : at + 2]).astype(np.float32)[..., None] for at in (0, 2))
    scales, offsets = scale * steps.reshape(shape), -offset * lows.reshape(shape)
    return scales.reshape(len(blocks), -1), offsets.reshape(len(blocks), -1)


def _halves(data: np.ndarray) -> np.ndarray:
    """[..., n] bytes -> [..., 2 n] codes: the lower halves, then the upper."""
    return np.concatenate([data & _LOW, data >> _HALF], -1)


def _numbers(data: np.ndarray) -> np.ndarray:
    """[..., 2] bytes -> [...] float16."""
    return np.ascontiguousarray(data).view(np.float16)[..., 0]


def _read_q4_0(data: np.ndarray) -> CodedWeight:
    """Blocks of 32: a scale, and 16 bytes."""
    blocks = data.reshape(len(data), -1, 18)
    return _coded(_halves(blocks[..., 2:]), _SIGNED, _numbers(blocks[..., :2]), None)


def _read_q4_1(data: np.ndarray) -> CodedWeight:
    """Blocks of 32: a scale, an offset, and 16 bytes."""
    blocks = data.reshape(len(data), -1, 20)
    return _coded(_halves(blocks[..., 4:]), _UNSIGNED, _numbers(blocks[..., :2]), _numbers(blocks[..., 2:4]))


def _read_q4_k(data: np.ndarray) -> CodedWeight:
    """Blocks of 256: `_scaled`, and 128 bytes, of which each 32 hold two blocks of 32."""
    blocks = data.reshape(len(data), -1, 144)
    codes = _halves(blocks[..., 16:].reshape(*blocks.shape[:2], 4, 32))
    return _coded(codes, _UNSIGNED, *_scaled(blocks))


def _fifth_bits(data: np.ndarray) -> np.ndarray:
    """[..., 4] bytes -> [..., 32], each of their bits as 16 or 0."""
    words = np.ascontiguousarray(data).view(np.uint32)
    return ((words >> np.arange(32, dtype=np.uint32) & 1) << 4).astype(np.uint8)


def _read_q5_0(data: np.ndarray) -> CodedWeight:
    """Blocks of 32: a scale, the fifth bits, and 16 bytes."""
    blocks = data.reshape(len(data), -1, 22)
    codes = (_halves(blocks[..., 6:]) | _fifth_bits(blocks[..., 2:6])).astype(np.int8) - 16
    return _wide(codes, _numbers(blocks[..., :2]))


def _read_q5_1(data: np.ndarray) -> CodedWeight:
    """Blocks of 32: a scale, an offset, the fifth bits, and 16 bytes."""
    blocks = data.reshape(len(data), -1, 24)
    codes = _halves(blocks[..., 8:]) | _fifth_bits(blocks[..., 4:8])
    return _wide(codes, _numbers(blocks[..., :2]), _numbers(blocks[..., 2:4]))


def _read_q5_k(data: np.ndarray) -> CodedWeight:
    """As Q4_K, with 32 bytes between of which each of the eight has a bit."""
    blocks = data.reshape(len(data), -1, 176)
    low = _halves(blocks[..., 48:].reshape(*blocks.shape[:2], 4, 32)).reshape(*blocks.shape[:2], 8, 32)
    high = blocks[..., None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None] & 1
    return _wide(low | high << _HALF, *_scaled(blocks))


def _read_q6_k(data: np.ndarray) -> CodedWeight:
    """Blocks of 256: 128 bytes of lower halves, 64 of upper quarters, 16 scales of 8 bits, and their scale."""
    blocks = data.reshape(len(data), -1, 210)
    halves = blocks[..., :128].reshape(*blocks.shape[:2], 2, 64)
    low = _halves(halves).reshape(*blocks.shape[:2], 2, 4, 32)
    quarters = blocks[..., 128:192].reshape(*blocks.shape[:2], 2, 1, 32)
    high = quarters >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3
    codes = (low | high << _HALF).astype(np.int8) - 32
    steps = blocks[..., 192:208].view(np.int8).astype(np.float32)
    scales = _numbers(blocks[..., 208:]).astype(np.float32)[..., None] * steps
    return _wide(codes, scales.reshape(len(data), -1))


def _read_q8_0(data: np.ndarray) -> CodedWeight:
    """Blocks of 32: a scale, and 32 numbers."""
    blocks = data.reshape(len(data), -1, 34)
    return _wide(blocks[..., 2:].view(np.int8), _numbers(blocks[..., :2]))


_READERS: Mapping[str, Callable[[np.ndarray], CodedWeight]] = {
    "Q4_0": _read_q4_0,
    "Q4_1": _read_q4_1,
    "Q4_K": _read_q4_k,
    "Q5_0": _read_q5_0,
    "Q5_1": _read_q5_1,
    "Q5_K": _read_q5_k,
    "Q6_K": _read_q6_k,
    "Q8_0": _read_q8_0,
}
