"""Everything that `onebase serve` prints once it serves: what was loaded, what it takes, and a request to try."""

import socket
from importlib.metadata import version

from rich.console import Console

from onebase_server.api.services import Services
from onebase_server.server_config import ServerConfig

_EVERYWHERE = ("0.0.0.0", "::")


def greet(console: Console, config: ServerConfig, services: Services, listener: socket.socket) -> None:
    """Print it."""
    info = services.engine.info
    entries = services.adapters.entries()
    idle = [entry for entry in entries if entry.problem is not None]
    address, port = listener.getsockname()[:2]
    host = "127.0.0.1" if address in _EVERYWHERE else f"[{address}]" if ":" in address else address
    url = f"http://{host}:{port}"
    cache = f"KV cache {_size(info.cache_bytes)} for {info.cache_tokens:,} tokens"
    rows = [
        ("base", f"{services.settings.base_name}: {info.quantization}, on {info.device}"),
        ("memory", f"weights {_size(info.weight_bytes)}, {cache}"),
        ("context", f"{services.longest:,} tokens a request"),
        ("adapters", f"{len(entries) - len(idle)} served" + (f", {len(idle)} not" if idle else "")),
        ("jobs", "run here" if services.runner.book.owned else f"run by another server with {config.jobs_folder}"),
        ("admin", "open with the admin key" if config.admin_key else "closed: no --admin-key"),
        ("url", f"{url}/v1"),
    ]
    seconds = sum(info.load_seconds.values())
    parts = ", ".join(f"{name} {took:.1f}" for name, took in info.load_seconds.items())
    console.print(f"[bold]OneBase {version('onebase')}[/bold], loaded in {seconds:.1f} s ({parts})")
    for name, text in rows:
        console.print(f"  {name:9} {text}", markup=False)
    for entry in idle:
        console.print(f"  not served: {entry.record.name}: {entry.problem}", markup=False, style="yellow")
    if address in _EVERYWHERE and not config.api_keys:
        console.print("  anyone who reaches this machine may use the base: no --api-key", style="yellow")
    served = next((entry.record.name for entry in entries if entry.problem is None), services.settings.base_name)
    key = "-H 'authorization: Bearer KEY' " if config.api_keys else ""
    console.print(
        f"  try       curl {url}/v1/completions {key}-H 'content-type: application/json' "
        f'-d \'{{"model": "{served}", "prompt": "The capital of France is", "max_tokens": 16}}\'',
        markup=False,
    )


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
