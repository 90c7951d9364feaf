"""`onebase serve`: the command line, resolved to one ServerConfig. What is heavy is imported once it is needed."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from onebase_adapters.errors import ConfigError
from onebase_engine.base.base_spec import DEFAULT_BASE, BaseSpec, Quantization
from onebase_engine.engine_config import EngineConfig, LogLevel
from onebase_engine.user_folders import data_home
from onebase_server.jobs.runner import JobSettings
from onebase_server.server_config import ServerConfig


def serve(
    model: Annotated[str, typer.Option(help="Base model: catalog name, folder, or hub id.")] = DEFAULT_BASE,
    *,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 for any free one.")] = 8000,
    served_name: Annotated[
        str | None, typer.Option(help="What requests call the base; default: the model's name.")
    ] = None,
    store: Annotated[
        Path | None, typer.Option(help="Folder of the registered adapters; default: in your data directory.")
    ] = None,
    adapter_root: Annotated[
        Path | None, typer.Option(help="Adapters may be registered by path from below this folder.")
    ] = None,
    admin_key: Annotated[
        str | None, typer.Option(envvar="ONEBASE_ADMIN_KEY", help="Opens the administration of adapters.")
    ] = None,
    api_key: Annotated[
        list[str] | None,
        typer.Option(envvar="ONEBASE_API_KEY", help="Needed for inference; may be given several times."),
    ] = None,
    jobs: Annotated[
        Path | None, typer.Option(help="Folder of fine-tuning jobs; default: in your data directory.")
    ] = None,
    jobs_at_once: Annotated[int, typer.Option(min=1, help="Fine-tuning jobs that train at once.")] = 1,
    job_threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of one; default: all cores.")] = None,
    job_memory: Annotated[
        float | None, typer.Option(min=0.5, help="Most memory of one, in GiB (Linux); default: what there is.")
    ] = None,
    quantization: Annotated[
        Quantization, typer.Option(help="4-bit format of the base; none keeps bfloat16.")
    ] = "nf4",
    double_quant: Annotated[bool, typer.Option(help="Quantise the 4-bit scales, too.")] = True,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:N, or auto.")] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; default: all cores.")] = None,
    max_model_len: Annotated[
        int | None, typer.Option(min=1, help="Most tokens of a request; default: the model's context.")
    ] = None,
    cache_gib: Annotated[
        float | None, typer.Option(min=0.001, help="Memory of the KV cache; default: a share of what is free.")
    ] = None,
    max_batch_tokens: Annotated[int, typer.Option(min=1, help="Most tokens computed in a step.")] = 512,
    max_running: Annotated[int, typer.Option(min=1, help="Most sequences in a step.")] = 256,
    max_waiting: Annotated[int, typer.Option(min=0, help="Most requests that wait; more get 429.")] = 1024,
    max_adapters: Annotated[int, typer.Option(min=1, help="Most adapters resident at once.")] = 256,
    prefix_cache: Annotated[bool, typer.Option(help="Reuse the cache of common beginnings.")] = True,
    log_level: Annotated[LogLevel, typer.Option(help="info has a line for each request.")] = "warning",
    log_json: Annotated[bool, typer.Option("--log-json", help="Log JSON lines.")] = False,
    otlp_endpoint: Annotated[
        str | None, typer.Option(help="Send OpenTelemetry traces to this collector, e.g. http://localhost:4318.")
    ] = None,
    grace: Annotated[float, typer.Option(min=0, help="Seconds to finish in when told to stop.")] = 30.0,
) -> None:
    """Serve one base model and its adapters, OpenAI-compatible."""
    if job_memory is not None and sys.platform != "linux":
        raise ConfigError("--job-memory is Linux's: nothing here would keep to it.", field="job_memory")
    engine = EngineConfig(
        base=BaseSpec(model, quantization, double_quant, device),
        max_model_len=max_model_len,
        cache_gib=cache_gib,
        max_batch_tokens=max_batch_tokens,
        max_running=max_running,
        max_waiting=max_waiting,
        max_adapters=max_adapters,
        reuse_prefixes=prefix_cache,
        log_level=log_level,
        log_format="json" if log_json else "text",
        threads=threads,
    )
    config = ServerConfig(
        engine=engine,
        store=store if store is not None else data_home() / "store",
        base_name=served_name or _short_name(model),
        jobs=JobSettings(
            model=model, device=device, at_once=jobs_at_once, threads=job_threads, memory_gib=job_memory
        ),
        jobs_folder=jobs if jobs is not None else data_home() / "jobs",
        host=host,
        port=port,
        adapter_root=_existing(adapter_root),
        admin_key=admin_key or None,
        api_keys=tuple(key for key in api_key or () if key),
        grace=grace,
        otlp_endpoint=otlp_endpoint,
    )
    from onebase_server.serving import run

    raise typer.Exit(run(config))


def _short_name(model: str) -> str:
    """A folder goes by its last part, everything else by what it was asked for."""
    folder = Path(model).expanduser()
    return folder.resolve().name if folder.is_dir() else model


def _existing(root: Path | None) -> Path | None:
    if root is None:
        return None
    if not root.is_dir() or not os.access(root, os.R_OK | os.X_OK):
        raise ConfigError(f"--adapter-root {root} is not a folder that can be read.", field="adapter_root")
    return root.resolve()
