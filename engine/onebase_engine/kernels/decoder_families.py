"""The families that the fused decoder runs: what each does differently. Add a model family here."""

from dataclasses import dataclass

_APART = (
    ("self_attn", ("q_proj", "k_proj", "v_proj")),
    ("self_attn", ("o_proj",)),
    ("mlp", ("gate_proj", "up_proj")),
    ("mlp", ("down_proj",)),
)

_JOINED = (
    ("self_attn", ("qkv_proj",)),
    ("self_attn", ("o_proj",)),
    ("mlp", ("gate_up_proj",)),
    ("mlp", ("down_proj",)),
)


@dataclass(frozen=True)
class Kind:
    """How a class of transformers' differs from Llama."""

    projections: tuple[tuple[str, tuple[str, ...]], ...] = _APART
    """The modules of its four projections."""
    norms: tuple[str, str] = ("input_layernorm", "post_attention_layernorm")
    """Before attention and MLP."""
    behind: tuple[str, str] = ("", "")
    """Norms of what attention and MLP give, where there are."""
    unit_offset: bool = False
    """Norms' weights are stored as what exceeds 1, and multiply in float32."""
    gelu: bool = False
    """The activation, by tanh; else silu."""
    neighbours: bool = False
    """Rotation of neighbours in a head as pairs; else of its halves."""


_GLM = (*_APART[:2], *_JOINED[2:])
_GEMMA3 = Kind(
    norms=("input_layernorm", "pre_feedforward_layernorm"),
    behind=("post_attention_layernorm", "post_feedforward_layernorm"),
    unit_offset=True,
    gelu=True,
)


MODELS = {
    "LlamaForCausalLM": Kind(),
    "MistralForCausalLM": Kind(),
    "Qwen2ForCausalLM": Kind(),
    "Qwen3ForCausalLM": Kind(),
    "Phi3ForCausalLM": Kind(_JOINED),
    "Gemma3ForCausalLM": _GEMMA3,
    "GlmForCausalLM": Kind(_GLM, neighbours=True),
    "Glm4ForCausalLM": Kind(_GLM, behind=("post_self_attn_layernorm", "post_mlp_layernorm"), neighbours=True),
}
"""transformers' classes whose arithmetic is exactly this file's."""
