"""ChatGLM's old layout, which repositories bring code of their own for, as a folder of transformers' GLM class.

Read are ChatGLM2-6B, ChatGLM3-6B (and its base) and GLM-4-9B (chat, 1M) of `model_type: chatglm`: one architecture,
whose tensors are renamed and whose joined queries, keys and values are taken apart. No code of the folder is run.
"""

import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from onebase_adapters.errors import BaseModelError
from onebase_engine.base.chatglm_tokenizer import write_tokenizer
from onebase_engine.base.coded_checkpoint import tensor_files
from onebase_engine.base.package_files import Progress

_FIXED: dict[str, Any] = {
    "rmsnorm": True,
    "post_layer_norm": True,
    "apply_residual_connection_post_layernorm": False,
    "add_bias_linear": False,
    "fp32_residual_connection": False,
    "pre_seq_len": None,
    "quantization_bit": 0,
}
"""Settings that the GLM class has for all models, and what they are there."""
_NAMES = {
    "transformer.embedding.word_embeddings.": "model.embed_tokens.",
    "transformer.encoder.final_layernorm.": "model.norm.",
    "transformer.encoder.layers.": "model.layers.",
    "transformer.output_layer.": "lm_head.",
}
_PARTS = {
    "input_layernorm": "input_layernorm",
    "post_attention_layernorm": "post_attention_layernorm",
    "self_attention.dense": "self_attn.o_proj",
    "mlp.dense_h_to_4h": "mlp.gate_up_proj",
    "mlp.dense_4h_to_h": "mlp.down_proj",
}
_JOINED = "self_attention.query_key_value"
_ANGLES = "transformer.rotary_pos_emb.inv_freq"
_LAYER = re.compile(r"(model\.layers\.\d+)\.(.+)\.(weight|bias)")
_SMALL_VOCABULARY = 100_000
"""ChatGLM2 and 3 have 65,024 tokens, GLM-4 has 151,552."""


def convert_chatglm(folder: Path, target: Path, progress: Progress) -> None:
    """Write `target` from a folder's config.json, safetensors and tokenizer, a file at a time. Raises
    BaseModelError, by name for what is something else: ChatGLM-6B of 2023, GLM-4V, quantised ones, the 32K ones."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    settings = json.loads((folder / "config.json").read_text())
    config = _config(settings)
    progress("converting ChatGLM's layout to transformers' GLM (once)")
    files: dict[Path, list[str]] = defaultdict(list)
    for name, path in tensor_files(folder).items():
        files[path].append(name)
    where: dict[str, str] = {}
    size = 0
    for path, names in sorted(files.items()):
        with safe_open(path, "pt") as file:
            written = dict(pair for name in names for pair in _renamed(name, file.get_tensor(name), config))
        save_file(written, target / path.name, {"format": "pt"})
        where |= dict.fromkeys(written, path.name)
        size += sum(tensor.nbytes for tensor in written.values())
    index = {"metadata": {"total_size": size}, "weight_map": where}
    (target / "model.safetensors.index.json").write_text(json.dumps(index))
    ends = write_tokenizer(folder, target)
    config.eos_token_id = sorted({*ends, *_numbers(settings.get("eos_token_id"))})
    config.save_pretrained(target)
    file = folder / "generation_config.json"
    generation = json.loads(file.read_text()) if file.is_file() else {}
    (target / file.name).write_text(json.dumps(generation | {"eos_token_id": config.eos_token_id}))


def _numbers(found: int | list[int] | None) -> list[int]:
    return found if isinstance(found, list) else [] if found is None else [found]


def _config(settings: Mapping[str, Any]) -> Any:
    from transformers import GlmConfig

    refused = _refused(settings)
    if refused is not None:
        raise BaseModelError(
            f"The base is {refused}, which is not read. Of the type chatglm, read are ChatGLM2-6B, ChatGLM3-6B and "
            "GLM-4-9B, plain.",
            field="model",
        )
    heads = settings["num_attention_heads"]
    return GlmConfig(
        vocab_size=settings["padded_vocab_size"],
        hidden_size=settings["hidden_size"],
        intermediate_size=settings["ffn_hidden_size"],
        num_hidden_layers=settings["num_layers"],
        num_attention_heads=heads,
        num_key_value_heads=settings["multi_query_group_num"] if settings.get("multi_query_attention") else heads,
        head_dim=settings["kv_channels"],
        max_position_embeddings=settings["seq_length"],
        rms_norm_eps=settings["layernorm_epsilon"],
        attention_bias=settings.get("add_qkv_bias", False),
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 1e4 * settings.get("rope_ratio", 1),
            "partial_rotary_factor": 0.5,
        },
        tie_word_embeddings=False,
        bos_token_id=None,
        pad_token_id=settings.get("pad_token_id"),
        architectures=["GlmForCausalLM"],
        dtype=settings.get("torch_dtype") or "bfloat16",
    )


def _refused(settings: Mapping[str, Any]) -> str | None:
    """What other model of the type it is."""
    if "position_encoding_2d" in settings or "inner_hidden_size" in settings:
        return "ChatGLM-6B of 2023, with positions in two dimensions and a prefix that sees itself whole"
    if "vision_config" in settings:
        return "GLM-4V"
    ratio = settings.get("rope_ratio", 1)
    if settings["padded_vocab_size"] < _SMALL_VOCABULARY and ratio != 1:
        return f"ChatGLM2-6B-32K or ChatGLM3-6B-32K, which mean different things by rope_ratio = {ratio}"
    wrong = {name: settings.get(name, fixed) for name, fixed in _FIXED.items()}
    other = {name: value for name, value in wrong.items() if (value or None) != (_FIXED[name] or None)}
    return f"a ChatGLM with {', '.join(f'{name} = {value}' for name, value in other.items())}" if other else None


def _renamed(name: str, tensor: torch.Tensor, config: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """A tensor by transformers' name, or the three that were joined in it."""
    if name == _ANGLES:
        return
    start = next((old for old in _NAMES if name.startswith(old)), "")
    new = _NAMES.get(start, "") + name.removeprefix(start)
    found = _LAYER.fullmatch(new)
    if start and not new.startswith("model.layers."):
        yield new, tensor
    elif found and found[2] == _JOINED:
        sizes = [
            heads * config.head_dim for heads in (config.num_attention_heads, *[config.num_key_value_heads] * 2)
        ]
        for part, rows in zip("qkv", torch.split(tensor, sizes), strict=True):
            yield f"{found[1]}.self_attn.{part}_proj.{found[3]}", rows.contiguous()
    elif found and found[2] in _PARTS:
        yield f"{found[1]}.{_PARTS[found[2]]}.{found[3]}", tensor
    else:
        raise BaseModelError(f"The base has a tensor {name}, which no ChatGLM that is read has.", field="model")
