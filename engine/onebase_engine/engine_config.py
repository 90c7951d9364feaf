"""The engine's settings: frozen, resolved once, handed to the engine process as they are."""

from dataclasses import dataclass, field
from typing import Literal

from onebase_engine.base.base_spec import BaseSpec

LogLevel = Literal["debug", "info", "warning", "error"]
LogFormat = Literal["text", "json"]
Head = Literal["screened", "bf16", "nf4"]


@dataclass(frozen=True)
class EngineConfig:
    """All that the engine needs to start."""

    base: BaseSpec = field(default_factory=BaseSpec)
    max_model_len: int | None = None
    """Most tokens of a request, prompt and output; None: what the model was made for."""
    cache_gib: float | None = None
    """Memory of the KV cache in GiB; None: `cache_share` of what the device has free."""
    cache_tokens: int | None = None
    """Tokens that the KV cache holds, where they are known; None: as its memory says."""
    cache_share: float = 0.1
    max_batch_tokens: int = 512
    """Tokens computed in a step, at most: the larger, the faster the prefill and the longer each step."""
    max_running: int = 256
    """Sequences in a step, at most."""
    max_waiting: int = 1024
    """Requests that may wait beyond those; the next one is refused with 429."""
    max_adapters: int = 256
    """Adapters resident at once; others are loaded when a request names them, least recently used out."""
    reuse_prefixes: bool = True
    """Keep the cache of finished requests for later ones with the same beginning."""
    head: Head = "screened"
    """How greedy tokens are found: from all logits (`bf16`), the same tokens through a 4-bit screen that leaves
    few for the full product (`screened`), or from a 4-bit head alone (`nf4`: quickest, costs quality)."""
    log_level: LogLevel = "warning"
    """The log level of this process and the API's; `info` has a line for each request."""
    log_format: LogFormat = "text"
    threads: int | None = None
    """CPU threads; None: all cores that the process may use."""
