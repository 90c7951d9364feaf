"""The server's settings: frozen, resolved once from the command line and the environment."""

from dataclasses import dataclass
from pathlib import Path

from onebase_engine.engine_config import EngineConfig
from onebase_server.jobs.runner import JobSettings


@dataclass(frozen=True)
class ServerConfig:
    """All that `onebase serve` needs."""

    engine: EngineConfig
    store: Path
    """The adapter store's folder."""
    base_name: str
    """The name by which requests call the base."""
    jobs: JobSettings
    """How fine-tuning jobs run."""
    jobs_folder: Path
    """Where their files and history are."""
    host: str = "127.0.0.1"
    port: int = 8000
    """0 takes any free one."""
    adapter_root: Path | None = None
    """Adapters may be registered by path from below this folder; None: by upload only."""
    admin_key: str | None = None
    """Opens the administration of adapters."""
    api_keys: tuple[str, ...] = ()
    """Any of them is needed for inference; without any, inference is open."""
    allowed_origins: tuple[str, ...] = ()
    """Web pages from these may call the API in a browser, from `*` all."""
    otlp_endpoint: str | None = None
    """URL of a collector that takes OpenTelemetry's traces over HTTP; None: none are made."""
    grace: float = 30.0
    """Seconds that requests in flight get to finish when the server is told to stop."""
