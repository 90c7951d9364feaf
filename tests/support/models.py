"""Tiny random models of each family that is served, saved as transformers saves real ones, and LoRA adapters for
them as PEFT saves them.

Every number is random, biases and norms included, so that leaving any of them out shows. Numbers are large
enough for clear winners among the logits: two right implementations then choose the same greedy tokens.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BertConfig,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    Glm4Config,
    GlmConfig,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    Phi3Config,
    PhiConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    RobertaConfig,
    SmolLM3Config,
    Starcoder2Config,
    T5Config,
    XLMRobertaConfig,
)
from transformers.pytorch_utils import Conv1D

from onebase_engine.base import families
from onebase_engine.base.load_base import quiet_loading
from support.tokenizer import EOS, SPECIAL, save_tokenizer

CONTEXT = 256
# A multiple of 64 for a 4-bit block of inputs, heads of 16: what the fast kernels take.
_FITS: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "eos_token_id": EOS,
    "bos_token_id": None,
    "pad_token_id": None,
}
# Four times less than the prompts of the tests, so that it matters.
_WINDOW = 24

FAMILIES: dict[str, Callable[[int], PreTrainedConfig]] = {
    "llama": lambda vocab: LlamaConfig(vocab_size=vocab, **_FITS, tie_word_embeddings=True),
    "llama-odd": lambda vocab: LlamaConfig(
        vocab_size=vocab - 9, **_FITS | {"hidden_size": 72, "intermediate_size": 100, "num_attention_heads": 6},
        head_dim=12,
    ),
    "mistral": lambda vocab: MistralConfig(vocab_size=vocab, **_FITS, head_dim=16, sliding_window=_WINDOW),
    "qwen2": lambda vocab: Qwen2Config(vocab_size=vocab, **_FITS),
    "qwen3": lambda vocab: Qwen3Config(vocab_size=vocab, **_FITS, head_dim=32),
    "phi3": lambda vocab: Phi3Config(vocab_size=vocab, **_FITS | {"intermediate_size": 192}),
    "gemma2": lambda vocab: Gemma2Config(
        vocab_size=vocab, **_FITS, head_dim=16, sliding_window=_WINDOW, query_pre_attn_scalar=16,
        attn_logit_softcapping=5.0, final_logit_softcapping=30.0,
    ),
    "gemma3": lambda vocab: Gemma3TextConfig(
        vocab_size=vocab, **_FITS, head_dim=16, sliding_window=_WINDOW, query_pre_attn_scalar=16,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
    ),
    "gpt2": lambda vocab: GPT2Config(
        vocab_size=vocab, n_embd=64, n_layer=3, n_head=4, n_positions=CONTEXT, eos_token_id=EOS, bos_token_id=None
    ),
    "glm": lambda vocab: GlmConfig(vocab_size=vocab, **_FITS, head_dim=16, attention_bias=True),
    "mixtral": lambda vocab: MixtralConfig(
        vocab_size=vocab, **_FITS, head_dim=16, num_local_experts=4, num_experts_per_tok=2, sliding_window=_WINDOW
    ),
    "qwen3_moe": lambda vocab: Qwen3MoeConfig(
        vocab_size=vocab, **_FITS, head_dim=32, num_experts=6, num_experts_per_tok=3, moe_intermediate_size=96,
        mlp_only_layers=[1],
    ),
    "t5": lambda vocab: T5Config(
        vocab_size=vocab, d_model=64, d_kv=16, d_ff=128, num_layers=3, num_decoder_layers=2, num_heads=4,
        n_positions=CONTEXT, feed_forward_proj="gated-gelu", eos_token_id=EOS, pad_token_id=0,
        decoder_start_token_id=0,
    ),
    "glm4": lambda vocab: Glm4Config(vocab_size=vocab, **_FITS, head_dim=16, attention_bias=True),
    "llama-dynamic": lambda vocab: LlamaConfig(
        vocab_size=vocab, **_FITS, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    ),
    "qwen2-window": lambda vocab: Qwen2Config(
        vocab_size=vocab, **_FITS, use_sliding_window=True, sliding_window=_WINDOW, max_window_layers=1
    ),
    # As Phi-4-mini: three quarters of a head are rotated, by other angles for long sequences.
    "phi3-partial": lambda vocab: Phi3Config(
        vocab_size=vocab, **_FITS | {"max_position_embeddings": 16 * CONTEXT, "intermediate_size": 192},
        original_max_position_embeddings=CONTEXT, tie_word_embeddings=True,
        rope_parameters={
            "rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 0.75,
            "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5], "long_factor": [1.0, 2.0, 4.0, 8.0, 16.0, 32.0],
        },
    ),
    "gemma": lambda vocab: GemmaConfig(vocab_size=vocab, **_FITS, head_dim=16),
    "phi": lambda vocab: PhiConfig(vocab_size=vocab, **_FITS),
    "gpt-neox": lambda vocab: GPTNeoXConfig(
        vocab_size=vocab, **{name: size for name, size in _FITS.items() if name != "num_key_value_heads"}
    ),
    "granite": lambda vocab: GraniteConfig(
        vocab_size=vocab, **_FITS, embedding_multiplier=3.0, residual_multiplier=0.7, attention_multiplier=0.3,
        logits_scaling=2.0,
    ),
    "olmo2": lambda vocab: Olmo2Config(vocab_size=vocab, **_FITS),
    "smollm3": lambda vocab: SmolLM3Config(vocab_size=vocab, **_FITS, no_rope_layer_interval=2),
    "starcoder2": lambda vocab: Starcoder2Config(vocab_size=vocab, **_FITS, sliding_window=_WINDOW),
    "cohere": lambda vocab: CohereConfig(vocab_size=vocab, **_FITS, logit_scale=0.5),
}  # fmt: skip
"""Language models by name, from the size of the vocabulary. `llama-odd` runs on no fast kernel."""

_ENCODER: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4,
    "max_position_embeddings": 130,
}  # fmt: skip
ENCODERS: dict[str, Callable[[int], PreTrainedConfig]] = {
    "bert": lambda vocab: BertConfig(vocab_size=vocab, **_ENCODER),
    "roberta": lambda vocab: RobertaConfig(vocab_size=vocab, pad_token_id=1, **_ENCODER),
    "xlm-roberta": lambda vocab: XLMRobertaConfig(vocab_size=vocab, pad_token_id=1, **_ENCODER),
}
"""Encoders likewise."""


def tiny_of(test: str, proof: Literal["served", "trained"]) -> list[str]:
    """The tiny configurations that the table of families says are proven by `test`, a path from the root."""
    return [name for family in families.FAMILIES.values() if getattr(family, proof) == test for name in family.tiny]


MIXTURES = ("mixtral", "qwen3_moe")

TARGETS: dict[str, Sequence[str]] = {
    "phi3": ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
    "phi3-partial": ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
    "phi": ("q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"),
    "gpt-neox": ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
    "starcoder2": ("q_proj", "k_proj", "v_proj", "o_proj", "c_fc", "c_proj"),
    "gpt2": ("c_attn", "c_proj", "c_fc"),
    "glm4": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"),
    "glm": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"),
    "mixtral": ("q_proj", "k_proj", "v_proj", "o_proj", "gate", "w1", "w2", "w3"),
    "qwen3_moe": ("q_proj", "k_proj", "v_proj", "o_proj", "gate", "gate_proj", "up_proj", "down_proj"),
    "t5": ("q", "k", "v", "o", "wi_0", "wi_1", "wo"),
}
"""The linear modules of a family's layers, where they have names of their own."""
_USUAL_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def targets(family: str) -> Sequence[str]:
    """Names of the linear modules of a family's layers."""
    return TARGETS.get(family, _USUAL_TARGETS)


def save_model(folder: Path, family: str) -> Path:
    """A model of `family` with a tokenizer, in bfloat16; returns `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    vocab = -(-save_tokenizer(folder) // 32) * 32
    if family == "t5":
        _end_texts(folder)
    config = FAMILIES[family](vocab)
    model = auto_class(config).from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() == 3:
            noise = _alike(noise, 0)
        with torch.no_grad():
            if parameter.dim() == 1:  # biases, and norms' weights, which are 1 (or stored as what exceeds it)
                parameter += 0.2 * noise
                if name == "decoder.final_layer_norm.weight":  # T5 divides by this before its tied head
                    parameter *= config.hidden_size**0.5
            elif any(part in name for part in ("embed", "wte", "wpe", "shared", "bias")):
                # Small beside what the layers add: with a tied head, each token's best successor is else itself.
                scaled = family.startswith("gemma")  # by the square root of the width, in the model
                parameter.copy_(noise * 0.3 / (config.hidden_size**0.5 if scaled else 1))
            else:
                parameter.copy_(noise / _inputs(model, name, parameter) ** 0.5)
    with quiet_loading():
        model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def _end_texts(folder: Path) -> None:
    """Put the end token behind every text, as T5's tokenizer does; its own class has another kind of vocabulary."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.post_processor = TemplateProcessing(single=f"$A {SPECIAL[EOS]}", special_tokens=[(SPECIAL[EOS], EOS)])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": SPECIAL[EOS], "bos_token": None, "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def auto_class(config: PreTrainedConfig) -> Any:
    """The Auto class of transformers for a language model of this kind."""
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


def _alike(noise: torch.Tensor, dim: int) -> torch.Tensor:
    """Let a mixture's experts, one after another in `dim`, differ by a tenth: a token as good as tied between two
    then hardly depends on which of them rounding makes it take, but all tokens show it if experts are mixed up."""
    first = noise.narrow(dim, 0, 1)
    return first + 0.1 * (noise - first)


def _inputs(model: torch.nn.Module, name: str, weight: torch.Tensor) -> int:
    owner = model.get_submodule(name.rpartition(".")[0])
    return owner.nx if isinstance(owner, Conv1D) else weight.shape[-1]


def save_lora(
    folder: Path,
    model: Path,
    *,
    rank: int = 8,
    modules: Sequence[str] | str = "all-linear",
    seed: int = 0,
    strength: float = 0.5,
    **options: Any,
) -> Path:
    """A LoRA adapter for the model in `model`, made and saved by PEFT, then with every number random.

    Its updates are about `strength` times what the base puts out. The numbers fit bfloat16, so that reading them
    into a server rounds nothing. `options` are LoraConfig's. Returns `folder`.
    """
    from peft import LoraConfig, get_peft_model

    with quiet_loading():
        kind = auto_class(AutoConfig.from_pretrained(model))
        base = kind.from_pretrained(model, dtype=torch.float32)
    names = modules if isinstance(modules, str) else list(modules)
    transposed = any(isinstance(module, Conv1D) for module in base.modules())
    options = {"lora_alpha": 2 * rank, "fan_in_fan_out": transposed} | options
    task = "CAUSAL_LM" if kind is AutoModelForCausalLM else "SEQ_2_SEQ_LM"
    adapted = get_peft_model(base, LoraConfig(r=rank, target_modules=names, task_type=task, **options))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            inner = parameter.shape[1]  # A's inputs, or B's rank
            size = 1.0 if "lora_A" in name else strength / 2
            noise = torch.randn(parameter.shape, generator=generator)
            if ".experts." in name:
                count = adapted.config.num_local_experts
                inner //= 1 if "lora_A" in name else count
                shape = (count, -1, inner) if "lora_A" in name else (len(noise), -1, count)
                noise = _alike(noise.view(shape), 0 if "lora_A" in name else 2).reshape(parameter.shape)
            noise *= size / inner**0.5
            parameter.data = noise.bfloat16().float()
    adapted.save_pretrained(folder)
    return folder
