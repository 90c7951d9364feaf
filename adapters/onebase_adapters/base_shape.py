"""The base as adapters see it: sites, sizes, fingerprint."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Site:
    """One linear module that adapters may change: y = W x (+ b), W of [out_features, in_features]."""

    name: str
    """Dotted module path in the transformers model, e.g. `model.layers.0.self_attn.q_proj`."""
    in_features: int
    out_features: int


@dataclass(frozen=True)
class BaseShape:
    """The base as adapters see it. Two bases with the same fingerprint have the same weights."""

    name: str
    """The name that the user gave: catalog name, folder or hub id."""
    hub_id: str
    """The name that others know it by: a hub id where there is one, else `name`."""
    fingerprint: str
    """Hex digest over weights' samples and configuration; see `fingerprint_folder`."""
    model_type: str
    layers: int
    hidden: int
    """Width of the residual stream."""
    vocab: int
    """Rows of the embedding; ids from here upwards are virtual tokens."""
    context: int
    """Largest position the model was made for, in tokens."""
    sites: Mapping[str, Site]
    embedding: str = ""
    """Module path of the input embedding."""
    tied_head: str = ""
    """Module path of the LM head where its matrix is the embedding's."""
    kv_heads: int = 0
    head_dim: int = 0
    encoder: bool = False
    """Bidirectional, without an LM head: it classifies and embeds, and generates nothing."""
    encoder_decoder: bool = False
    """An encoder reads the prompt, a decoder with attention to what it made of it writes (T5)."""
    decoder_start: int = 0
    """The token that the decoder of an encoder-decoder begins with."""
    first_position: int = 0
    """Index of a sequence's first token in the model's table of positions."""
    sublayers: frozenset[str] = frozenset()
    """Module paths of the attention and feed-forward blocks, behind which bottleneck adapters go."""
