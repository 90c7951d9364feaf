"""What an adapter must know of its base, as a plain value: sites, sizes, fingerprint. No weights in it."""

import re
from dataclasses import dataclass
from typing import Any

from torch import nn

from onebase_adapters.base_shape import BaseShape, Site
from onebase_adapters.errors import BaseModelError
from onebase_engine.base.catalog import HUB_IDS
from onebase_engine.base.families import steady_positions


@dataclass(frozen=True)
class CacheShape:
    """The cache's shape: one key and one value of each token for each layer and head."""

    layers: int
    kv_heads: int
    dim: int

    @property
    def token_bytes(self) -> int:
        """In bfloat16."""
        return self.layers * self.kv_heads * self.dim * 2 * 2


def cache_shape(config: Any) -> CacheShape:
    """Read it off a transformers configuration."""
    text = config.get_text_config()
    heads = text.num_attention_heads
    dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    layers = getattr(text, "num_decoder_layers", None) or text.num_hidden_layers
    return CacheShape(layers, getattr(text, "num_key_value_heads", None) or heads, dim)


def is_encoder(config: Any) -> bool:
    """Whether a transformers configuration is that of a BERT-like encoder."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    masked = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return masked and not getattr(config, "is_decoder", False) and not config.is_encoder_decoder


_SUBLAYER = re.compile(
    r"\.\d+\.(self_attn|attn|self_attention|mlp|attention\.output\.dense|output\.dense)$|\.layers\.\d+\.attention$"
)
"""What transformers calls a layer's two blocks; in BERT's kind, the last modules of them before the residual."""


def describe_base(model: nn.Module, name: str, fingerprint: str) -> BaseShape:
    """Read the shape off a loaded transformers model (which may carry adapters or our wrappers: not yet)."""
    config: Any = model.config
    text = config.get_text_config()
    cache, first = cache_shape(config), _first_position(model)
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    return BaseShape(
        name=name,
        hub_id=HUB_IDS.get(name, name),
        fingerprint=fingerprint,
        model_type=config.model_type,
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        vocab=text.vocab_size,
        context=min(size for size in (_positions(text) - first, steady_positions(text)) if size),
        sites={site.name: site for site in _linear_sites(model)},
        embedding=_name_of(model, embedding),
        tied_head=_tied_head(model, embedding),
        kv_heads=cache.kv_heads,
        head_dim=cache.dim,
        encoder=is_encoder(config),
        encoder_decoder=config.is_encoder_decoder,
        decoder_start=decoder_start(model) if config.is_encoder_decoder else 0,
        first_position=first,
        sublayers=frozenset(name for name, _ in model.named_modules() if _SUBLAYER.search(name)),
    )


def _tied_head(model: Any, embedding: Any) -> str:
    head = model.get_output_embeddings()
    if head is None or head.weight is not embedding.weight:
        return ""
    return _name_of(model, head)


def _name_of(model: nn.Module, wanted: Any) -> str:
    name: str = next(name for name, module in model.named_modules() if module is wanted)
    return name


def _positions(config: Any) -> int:
    """The context in tokens. Relative positions have no end: T5 was made for 512."""
    named = (getattr(config, name, None) for name in ("max_position_embeddings", "n_positions"))
    return next((size for size in named if size), 512)


def decoder_start(model: Any) -> int:
    """The token that an encoder-decoder's output begins with. Raises BaseModelError."""
    for place in (model.generation_config, model.config):
        if (token := getattr(place, "decoder_start_token_id", None)) is not None:
            return int(token)
    raise BaseModelError("The configuration names no decoder_start_token_id: what does the decoder begin with?")


def _linear_sites(model: nn.Module) -> list[Site]:
    from transformers.pytorch_utils import Conv1D

    sites = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):  # bitsandbytes' Linear4bit is one too
            sites.append(Site(name, module.in_features, module.out_features))
        elif isinstance(module, Conv1D):
            sites.append(Site(name, module.nx, module.nf))
    return sites


def _first_position(model: nn.Module) -> int:
    """The index of a sequence's first token in the table of positions: RoBERTa's begins behind its padding."""
    padding = [
        module.padding_idx
        for name, module in model.named_modules()
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding)
    ]
    return padding[0] + 1 if padding and padding[0] is not None else 0
