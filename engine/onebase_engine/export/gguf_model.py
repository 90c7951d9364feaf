"""A transformers model as one GGUF file, with its tokenizer and its chat template, and the same file read back.

What GGUF has no place for is found by comparison: the file is read as any base is, and its configuration must be
the model's. Norms and biases are in float32, as llama.cpp wants them.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf.quants import quant_shape_to_byte_shape, quantize
from safetensors import safe_open

from onebase_adapters.atomic_files import disk_errors
from onebase_adapters.errors import BaseModelError
from onebase_engine.base.gguf_file import ARCHITECTURES, added_to, convert_gguf, rows_of
from onebase_engine.base.package_files import Progress
from onebase_engine.export.gguf_names import architecture_of
from onebase_engine.export.gguf_tokenizer import add_tokenizer, check_tokenizer
from onebase_engine.export.model_form import GgufForm

_KINDS = {
    "gguf": (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "gguf-f16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "gguf-q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}
_WITH_WINDOW = ("gemma3", "phi3")
"""Architectures whose window llama.cpp heeds."""
_NO_MATTER = {
    *("architectures", "dtype", "model_type", "transformers_version", "quantization_config"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "use_cache", "initializer_range", "pretraining_tp"),
    *("attention_dropout", "embd_pdrop", "resid_pdrop", "is_llama_config", "rope_interleaved", "max_window_layers"),
}
"""Parts of a configuration that change no logits, or that are held by the tokenizer."""


def write_gguf_model(folder: Path, file: Path, form: GgufForm) -> None:
    """Write the model in `folder` to `file`. Raises AdapterError or BaseModelError for what GGUF has no place for,
    or StorageError."""
    from transformers import AutoConfig, AutoTokenizer

    config = AutoConfig.from_pretrained(folder)
    architecture = architecture_of(config.model_type)
    kind, file_type = _KINDS[form]
    with disk_errors(str(file)):
        writer = gguf.GGUFWriter(file, architecture)
        writer.add_name(file.stem)
        writer.add_file_type(file_type)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        _add_settings(writer, config, architecture)
        add_tokenizer(writer, AutoTokenizer.from_pretrained(folder), config.vocab_size)
        names = gguf.get_tensor_name_map(ARCHITECTURES[architecture], config.num_hidden_layers)
        for name, shape, _ in _tensors(folder):
            module, _, last = name.rpartition(".")
            if (stem := names.get_name(module)) is None:
                raise BaseModelError(f"GGUF has no place for the model's {name}.", field="model")
            form = _form(shape, kind)
            stored = quant_shape_to_byte_shape(shape, form)
            writer.add_tensor_info(f"{stem}.{last}", stored, np.dtype(np.uint8), math.prod(stored), raw_dtype=form)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, shape, tensor in _tensors(folder):
            value = tensor.float() + added_to(name, architecture)
            order = rows_of(name, config, architecture)
            if not isinstance(order, slice):
                value = value[order.argsort()]
            writer.write_tensor_data(np.ascontiguousarray(quantize(value.numpy(), _form(shape, kind))))
        writer.close()


def read_back(folder: Path, file: Path, target: Path, progress: Progress) -> None:
    """Read `file` into the folder `target` as a base is read, and compare what is not in the weights with the model
    in `folder`. Raises BaseModelError."""
    from transformers import AutoTokenizer

    convert_gguf(file, target, progress)
    wanted, found = (json.loads((each / "config.json").read_text()) for each in (folder, target))
    for name, value in wanted.items():
        if name not in _NO_MATTER and name[0] != "_" and not _same(value, found.get(name)):
            raise BaseModelError(
                f"GGUF has no place for the model's {name}: it was {value}, and is {found.get(name)}. "
                "`--to transformers` writes the model with it.",
                field="to",
            )
    check_tokenizer(*(AutoTokenizer.from_pretrained(each) for each in (folder, target)))


def _form(shape: tuple[int, ...], kind: gguf.GGMLQuantizationType) -> gguf.GGMLQuantizationType:
    if len(shape) == 1:
        return gguf.GGMLQuantizationType.F32
    block, _ = gguf.GGML_QUANT_SIZES[kind]
    return kind if shape[-1] % block == 0 else gguf.GGMLQuantizationType.F16


def _tensors(folder: Path) -> Iterator[tuple[str, tuple[int, ...], torch.Tensor]]:
    """Each parameter's name, shape and value, one in memory at a time."""
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as part:
            for name in sorted(part.keys()):
                tensor = part.get_tensor(name)
                yield name, tuple(tensor.shape), tensor


def _add_settings(writer: gguf.GGUFWriter, config: Any, architecture: str) -> None:
    heads = config.num_attention_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    rotary = config.rope_parameters
    rotary = rotary.get("full_attention", rotary)  # a layer type's own
    writer.add_vocab_size(config.vocab_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(dim)
    writer.add_value_length(dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(int(dim * rotary.get("partial_rotary_factor", 1)))
    writer.add_rope_freq_base(rotary["rope_theta"])
    if architecture in _WITH_WINDOW and config.sliding_window:
        writer.add_sliding_window(config.sliding_window)


def _same(wanted: Any, found: Any) -> bool:
    """Whether two settings are equal but for the rounding of a float32."""
    if isinstance(wanted, dict) and isinstance(found, dict):
        return wanted.keys() == found.keys() and all(_same(value, found[key]) for key, value in wanted.items())
    if isinstance(wanted, float) and isinstance(found, int | float):
        return math.isclose(wanted, found, rel_tol=1e-6)
    return bool(wanted == found)
