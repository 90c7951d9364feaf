"""The adapter instruction set: what every PEFT method is lowered to, and all that the engine knows of adapters.

At a linear site a token goes through its adapter's Rescale of the input, the base's product, LowRank, Rescale of
the output, and Shift, in this order.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch

Activation = Literal["identity", "relu", "gelu", "gelu_tanh", "silu", "tanh"]
ACTIVATIONS: tuple[Activation, ...] = get_args(Activation)


@dataclass(frozen=True)
class LowRank:
    """y += scale * B (A x) at a linear site (LoRA, Hu et al. 2021, section 4.1).

    At the input embedding x is one-hot: the row of a token changes by scale * B A[:, token].
    """

    site: str
    a: torch.Tensor
    """[rank, in_features]"""
    b: torch.Tensor
    """[out_features, rank]"""
    scale: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def parameters(self) -> int:
        return self.a.numel() + self.b.numel()


@dataclass(frozen=True)
class Rescale:
    """Multiply a linear site's input or output, feature by feature (IA3, Liu et al. 2022, section 3.3)."""

    site: str
    vector: torch.Tensor
    """[in_features] or [out_features]"""
    side: Literal["input", "output"]

    @property
    def parameters(self) -> int:
        return self.vector.numel()


@dataclass(frozen=True)
class Shift:
    """Add to a linear site's output: a trained bias."""

    site: str
    vector: torch.Tensor
    """[out_features]"""

    @property
    def parameters(self) -> int:
        return self.vector.numel()


@dataclass(frozen=True)
class VirtualTokens:
    """Learned embeddings among the prompt's (prompt tuning, Lester et al. 2021; P-tuning, Liu et al. 2021)."""

    embeddings: torch.Tensor
    """[n, hidden]"""
    places: tuple[int, ...]
    """n of them; see `Layout.places`."""

    @property
    def parameters(self) -> int:
        return self.embeddings.numel()


@dataclass(frozen=True)
class KVPrefix:
    """Learned keys and values that all tokens attend to, at the positions 0 to n-1 of every layer; keys as they lie
    in the cache, so after the rotary embedding (prefix tuning, Li and Liang 2021, section 4). An encoder-decoder
    has them before what its decoder writes: layer i those of the place 2 i, from the first again where there are
    too few, as PEFT reads them."""

    keys: torch.Tensor
    """[layers, n, kv_heads, dim]"""
    values: torch.Tensor
    """[layers, n, kv_heads, dim]"""

    @property
    def tokens(self) -> int:
        return self.keys.shape[1]

    @property
    def parameters(self) -> int:
        return self.keys.numel() + self.values.numel()


@dataclass(frozen=True)
class Bottleneck:
    """h += scale * up(activation(down(s))) at the end of a sublayer, h its output before the residual is added.

    s is h (Houlsby et al. 2019, figure 2), or in parallel the sublayer's input (He et al. 2022, section 3).
    """

    site: str
    """The sublayer: module path of an attention or MLP block."""
    down: torch.Tensor
    """[r, hidden]"""
    down_bias: torch.Tensor
    """[r]"""
    up: torch.Tensor
    """[hidden, r]"""
    up_bias: torch.Tensor
    """[hidden]"""
    activation: Activation
    scale: float
    parallel: bool

    @property
    def parameters(self) -> int:
        return sum(t.numel() for t in (self.down, self.down_bias, self.up, self.up_bias))


@dataclass(frozen=True)
class Head:
    """A linear classifier on the last hidden states in place of the LM head."""

    kind: Literal["sequence", "token"]
    pooling: Literal["first", "last", "mean"]
    """The hidden state that a sequence head reads."""
    weight: torch.Tensor
    """[labels, hidden]"""
    bias: torch.Tensor
    """[labels]"""
    labels: tuple[str, ...]

    @property
    def parameters(self) -> int:
        return self.weight.numel() + self.bias.numel()


@dataclass(frozen=True)
class Template:
    """Text around the prompt: a hard prompt. No weights."""

    before: str = ""
    after: str = ""
    messages: tuple[Mapping[str, str], ...] = ()
    """Turns that go in front of a conversation: a system text, examples."""
    stop: tuple[str, ...] = ()
    """Where one of these begins, the answer is over: what was not trained to end goes on with another example."""
    parameters: int = field(default=0, init=False)


Primitive = LowRank | Rescale | Shift | VirtualTokens | KVPrefix | Bottleneck | Head | Template
