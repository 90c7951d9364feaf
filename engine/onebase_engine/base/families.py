"""The families of models that are served and trained, each with its proof. A model of any other class is refused.

A class of transformers runs here without a file of its own, so nearly any would load; whether its numbers are right
is known only of those that a test compares with transformers. `onebase models` prints this table.
"""

from dataclasses import dataclass
from typing import Any

from onebase_adapters.errors import BaseModelError
from onebase_engine.kernels.decoder_families import MODELS


@dataclass(frozen=True)
class Family:
    """Models of one transformers class."""

    about: str
    """Models of it that people know."""
    tiny: tuple[str, ...]
    """The tiny configurations in `tests/support/models.py` that prove it."""
    served: str = "tests/parity/test_families.py"
    """The test that serves them with adapters, alone and in a mixed batch."""
    trained: str = "tests/training/test_train_families.py"
    """The test that trains an adapter on them and serves it."""
    gguf: str = ""
    """What llama.cpp calls the architecture, where its files are read."""
    codes: bool = True
    """Whether GPTQ, AWQ and compressed-tensors are read: decoders of linear modules with the checkpoint's names."""


_ENCODERS: dict[str, Any] = {
    "served": "tests/parity/test_encoders.py",
    "trained": "tests/training/test_train_heads.py",
    "codes": False,
}

FAMILIES = {
    "LlamaForCausalLM": Family(
        "Llama 2 and 3, SmolLM2, TinyLlama", ("llama", "llama-odd", "llama-dynamic"), gguf="llama"
    ),
    "MistralForCausalLM": Family("Mistral 7B, Ministral 8B", ("mistral",), gguf="llama"),
    "Qwen2ForCausalLM": Family("Qwen 1.5, 2 and 2.5, R1 distilled", ("qwen2", "qwen2-window"), gguf="qwen2"),
    "Qwen3ForCausalLM": Family("Qwen3, dense", ("qwen3",), gguf="qwen3"),
    "Phi3ForCausalLM": Family("Phi-3, Phi-4, Phi-4-mini", ("phi3", "phi3-partial"), gguf="phi3"),
    "PhiForCausalLM": Family("Phi-1, Phi-2", ("phi",)),
    "GemmaForCausalLM": Family("Gemma", ("gemma",)),
    "Gemma2ForCausalLM": Family("Gemma 2", ("gemma2",)),
    "Gemma3ForCausalLM": Family("Gemma 3, text only", ("gemma3",), gguf="gemma3"),
    "GlmForCausalLM": Family("GLM-4-9B, GLM-Edge; ChatGLM2 and 3", ("glm",)),
    "Glm4ForCausalLM": Family("GLM-4-0414, GLM-Z1", ("glm4",)),
    "GPT2LMHeadModel": Family("GPT-2, DistilGPT-2", ("gpt2",), codes=False),
    "GPTNeoXForCausalLM": Family("Pythia, GPT-NeoX-20B", ("gpt-neox",), codes=False),
    "GraniteForCausalLM": Family("Granite 3, dense", ("granite",)),
    "Olmo2ForCausalLM": Family("OLMo 2", ("olmo2",)),
    "MixtralForCausalLM": Family(
        "Mixtral", ("mixtral",), trained="tests/training/test_train_mixture.py", codes=False
    ),
    "Qwen3MoeForCausalLM": Family(
        "Qwen3-30B-A3B", ("qwen3_moe",), trained="tests/training/test_train_mixture.py", codes=False
    ),
    "SmolLM3ForCausalLM": Family("SmolLM3", ("smollm3",)),
    "Starcoder2ForCausalLM": Family("StarCoder2", ("starcoder2",)),
    "CohereForCausalLM": Family("Command R", ("cohere",)),
    "BertModel": Family("BERT, MiniLM, BGE", ("bert",), **_ENCODERS),
    "RobertaModel": Family("RoBERTa", ("roberta",), **_ENCODERS),
    "XLMRobertaModel": Family("XLM-R, multilingual E5, BGE-M3", ("xlm-roberta",), **_ENCODERS),
    "T5ForConditionalGeneration": Family(
        "T5, Flan-T5",
        ("t5",),
        served="tests/parity/test_seq2seq.py",
        trained="tests/training/test_train_seq2seq.py",
        codes=False,
    ),
}
"""By transformers' class."""

FUSED = frozenset(MODELS)
"""Those whose decoders run on our fused layers, where the rest of their configuration allows it."""

_LAYERS = {"full_attention", "sliding_attention"}
_ROTATIONS = {"default", "linear", "llama3", "yarn", "dynamic", "longrope"}
_CHANGING = {"dynamic": "max_position_embeddings", "longrope": "original_max_position_embeddings"}
"""Rotations that turn all tokens of a sequence otherwise once it is longer than this setting."""


def family_of(config: Any) -> Family:
    """The family of a transformers configuration. Raises BaseModelError for one that is not served, with what its
    attention or rotation has that the engine does not compute."""
    name, beyond = class_of(config), _beyond(config)
    if name in FAMILIES and beyond is None:
        return FAMILIES[name]
    why = beyond or "no test here compares it with transformers, and nearly right is worse than refused"
    raise BaseModelError(
        f"The base is a {name or config.model_type}, which is not served: {why}. `onebase models` lists what is.",
        field="model",
    )


def class_of(config: Any) -> str:
    """The class that the configuration's model is loaded as; empty where transformers has no language model."""
    from transformers.models.auto import modeling_auto as auto

    from onebase_engine.base.describe import is_encoder

    names: Any = auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if is_encoder(config):
        names = auto.MODEL_MAPPING_NAMES
    elif config.is_encoder_decoder:
        names = auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
    found = names.get(config.model_type, "")
    return found if isinstance(found, str) else str(found[0])


def _beyond(config: Any) -> str | None:
    """What the engine does not compute: it attends to all tokens before, or to those in a window, by scaled
    products with an optional soft cap, over keys and values of each head, which are rotated by position."""
    text = config.get_text_config()

    def has(*names: str) -> bool:
        return any(getattr(text, name, None) for name in names)

    kinds = {kind for kind in getattr(text, "layer_types", None) or () if kind not in _LAYERS}
    rotations = {found["rope_type"] for found in _rotations(text)} - _ROTATIONS
    if kinds:
        return f"it has layers of {', '.join(sorted(kinds))}"
    if has("state_size", "ssm_state_size", "mamba_d_state", "mamba_expand", "lru_width"):
        return "it has layers that keep a state in place of keys and values"
    if has("kv_lora_rank"):
        return "its keys and values are compressed"
    if has("alibi"):
        return "its attention adds a bias by distance"
    if has("attention_chunk_size"):
        return "its attention is in chunks"
    if has("use_bidirectional_attention"):
        return "it is a decoder that sees the tokens after each one"
    if has("add_cross_attention"):
        return "it attends to an encoder"
    if rotations:
        return f"its rotation is {', '.join(sorted(rotations))}"
    return None


def _rotations(text: Any) -> list[dict[str, Any]]:
    """The settings of each of a configuration's rotations."""
    found = getattr(text, "rope_parameters", None) or {}
    each = [found] if "rope_type" in found else found.values()
    return [settings for settings in each if isinstance(settings, dict) and "rope_type" in settings]


def steady_positions(text: Any) -> int | None:
    """How long a sequence may be before its rotation changes with its length; None if it never does.

    Keys in the cache were rotated when their sequence was shorter, and sequences of all lengths share a batch and
    their prefixes: past this length no answer would be what the sequence gets alone."""
    limits = [
        settings.get(setting) or getattr(text, setting)
        for settings in _rotations(text)
        if (setting := _CHANGING.get(settings["rope_type"])) is not None
    ]
    return min(limits, default=None)
