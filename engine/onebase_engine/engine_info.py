"""What the engine tells of itself and of its adapters: plain values."""

from typing import Literal

import msgspec


class EngineInfo(msgspec.Struct, frozen=True):
    """What was loaded; the facts that start-up prints and the API validates against."""

    model: str
    fingerprint: str
    model_type: str
    quantization: str
    device: str
    vocab: int
    context: int
    """Most tokens a request may have in all (prompt and output): the model's, or less if so configured."""
    cache_tokens: int
    """Tokens that the KV cache holds."""
    weight_bytes: int
    cache_bytes: int
    eos_token_ids: tuple[int, ...]
    load_seconds: dict[str, float]
    """How long each part of loading took, in order."""
    generates: bool = True
    """False for an encoder, which only classifies and embeds."""
    max_adapters: int = 0
    """Adapters that can be resident at once."""
    width: int = 0
    """Numbers of an embedding."""


class HeadInfo(msgspec.Struct, frozen=True):
    """A classification head."""

    kind: Literal["sequence", "token"]
    labels: tuple[str, ...]


class TemplateInfo(msgspec.Struct, frozen=True):
    """Text that the API puts around prompts (`before`, `after`) and in front of conversations (`messages`); an
    answer ends where one of `stop` begins."""

    before: str
    after: str
    messages: tuple[dict[str, str], ...]
    stop: tuple[str, ...] = ()


class AdapterInfo(msgspec.Struct, frozen=True):
    """What an adapter turned out to be when it was lowered."""

    method: str
    rank: int | None
    """The largest, where the method has one."""
    parameters: int
    bytes: int
    """Memory while resident."""
    primitives: tuple[str, ...]
    """For example `LowRank x 210`."""
    sites: int
    virtual_tokens: int = 0
    """Taken from the context by each of its requests."""
    head: HeadInfo | None = None
    template: TemplateInfo | None = None
    notes: tuple[str, ...] = ()
    """What its owner should know, e.g. the error of an approximation."""
    chat_template: str | None = None
    """Its own, which chats with it are written by."""


class EngineStats(msgspec.Struct, frozen=True):
    """A snapshot, for metrics and health."""

    running: int
    waiting: int
    blocks_total: int
    blocks_free: int
    blocks_cached: int
    blocks_used: int
    steps: int
    model_seconds: float
    """Spent in the model up to the last hidden states. A GPU's work is not waited for."""
    prompt_tokens: int
    generated_tokens: int
    cached_tokens: int
    preemptions: int
    adapters_loaded: int
    adapter_bytes: int
    adapter_loads: int
    """How often one was made resident, and how often one left for another."""
    adapter_evictions: int
