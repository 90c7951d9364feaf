"""`onebase serve`: the command line, resolved to one ServerConfig. What is heavy is imported once it is needed."""

import os
import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from onebase.cli.config_file import ConfigFile
from onebase_adapters.errors import ConfigError
from onebase_engine.base.base_spec import DEFAULT_BASE, BaseSpec, Quantization
from onebase_engine.engine_config import EngineConfig, Head, LogLevel
from onebase_engine.user_folders import data_home
from onebase_server.jobs.runner import JobSettings
from onebase_server.server_config import ServerConfig

_option = partial(typer.Option, show_envvar=False)
_MODEL, _NETWORK, _ACCESS, _LIMITS = "Model", "Network", "Adapters and keys", "Memory and limits"
_JOBS, _LOGS = "Fine-tuning jobs", "Logs and traces"


def serve(
    base: Annotated[
        str | None, typer.Argument(help="The base model, as with --model.", show_default=False, show_envvar=False)
    ] = None,
    *,
    model: Annotated[
        str, _option(rich_help_panel=_MODEL, help="Base model: catalog name, folder, .gguf file, or hub id.")
    ] = DEFAULT_BASE,
    served_name: Annotated[
        str | None,
        _option(rich_help_panel=_MODEL, help="What requests call the base. Default: the model's name."),
    ] = None,
    quantization: Annotated[
        Quantization,
        _option(rich_help_panel=_MODEL, help="4-bit format of the base's weights; none keeps bfloat16."),
    ] = BaseSpec.quantization,
    double_quant: Annotated[
        bool, _option(rich_help_panel=_MODEL, help="Quantise the scales of 4-bit weights, too.")
    ] = BaseSpec.double_quant,
    device: Annotated[
        str, _option(rich_help_panel=_MODEL, help="cpu, cuda, cuda:N, or auto: cuda where there is one.")
    ] = BaseSpec.device,
    threads: Annotated[
        int | None, _option(rich_help_panel=_MODEL, min=1, help="CPU threads. Default: all cores.")
    ] = EngineConfig.threads,
    head: Annotated[
        Head,
        _option(
            rich_help_panel=_MODEL,
            help="How a greedy token is found: from all logits (bf16), the same through a 4-bit screen (screened), "
            "or by 4-bit logits alone, which costs quality (nf4).",
        ),
    ] = EngineConfig.head,
    host: Annotated[
        str, _option(rich_help_panel=_NETWORK, help="Address to listen on; 0.0.0.0 for all.")
    ] = ServerConfig.host,
    port: Annotated[
        int,
        _option(rich_help_panel=_NETWORK, min=0, max=65535, help="Port to listen on; 0 takes any free one."),
    ] = ServerConfig.port,
    admin_key: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=_ACCESS,
            envvar="ONEBASE_ADMIN_KEY",
            help="Key that opens the administration of adapters.",
        ),
    ] = ServerConfig.admin_key,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            rich_help_panel=_ACCESS,
            envvar="ONEBASE_API_KEY",
            help="Key that inference needs; any of several. Default: none is needed.",
        ),
    ] = None,
    allowed_origins: Annotated[
        list[str] | None,
        _option(
            "--allowed-origins",
            rich_help_panel=_NETWORK,
            help="Origin whose web pages may call the API, e.g. https://app.example; several, or * for all. "
            "Default: none.",
        ),
    ] = None,
    adapter_root: Annotated[
        Path | None,
        _option(rich_help_panel=_ACCESS, help="Folder below which adapters may be registered by path."),
    ] = ServerConfig.adapter_root,
    store: Annotated[
        Path | None,
        _option(rich_help_panel=_ACCESS, help="Folder of the registered adapters. Default: your data directory's."),
    ] = None,
    max_model_len: Annotated[
        int | None,
        _option(rich_help_panel=_LIMITS, min=1, help="Most tokens of a request. Default: the model's context."),
    ] = EngineConfig.max_model_len,
    cache_gib: Annotated[
        float | None,
        _option(
            rich_help_panel=_LIMITS,
            min=0.001,
            help="Memory of the KV cache in GiB. Default: --cache-share of what is free.",
        ),
    ] = EngineConfig.cache_gib,
    cache_share: Annotated[
        float,
        _option(rich_help_panel=_LIMITS, min=0.001, max=1, help="Share of the free memory for the KV cache."),
    ] = EngineConfig.cache_share,
    max_batch_tokens: Annotated[
        int, _option(rich_help_panel=_LIMITS, min=1, help="Most tokens computed in a step.")
    ] = EngineConfig.max_batch_tokens,
    max_running: Annotated[
        int, _option(rich_help_panel=_LIMITS, min=1, help="Most sequences in a step.")
    ] = EngineConfig.max_running,
    max_waiting: Annotated[
        int, _option(rich_help_panel=_LIMITS, min=0, help="Most requests that wait; more get a 429.")
    ] = EngineConfig.max_waiting,
    max_adapters: Annotated[
        int, _option(rich_help_panel=_LIMITS, min=1, help="Most adapters in memory at once.")
    ] = EngineConfig.max_adapters,
    prefix_cache: Annotated[
        bool, _option(rich_help_panel=_LIMITS, help="Keep what prompts have in common for later requests.")
    ] = EngineConfig.reuse_prefixes,
    grace: Annotated[
        float,
        _option(
            rich_help_panel=_LIMITS, min=0, help="Seconds for requests to finish in when the server is stopped."
        ),
    ] = ServerConfig.grace,
    jobs: Annotated[
        Path | None,
        _option(rich_help_panel=_JOBS, help="Folder of fine-tuning jobs. Default: your data directory's."),
    ] = None,
    jobs_at_once: Annotated[
        int, _option(rich_help_panel=_JOBS, min=1, help="Fine-tuning jobs that train at once.")
    ] = JobSettings.at_once,
    job_threads: Annotated[
        int | None, _option(rich_help_panel=_JOBS, min=1, help="CPU threads of a job. Default: all cores.")
    ] = JobSettings.threads,
    job_memory: Annotated[
        float | None,
        _option(
            rich_help_panel=_JOBS, min=0.5, help="Most memory of a job in GiB (Linux). Default: what there is."
        ),
    ] = JobSettings.memory_gib,
    log_level: Annotated[
        LogLevel, _option(rich_help_panel=_LOGS, help="What is logged; info has a line for each request.")
    ] = EngineConfig.log_level,
    log_json: Annotated[bool, _option("--log-json", rich_help_panel=_LOGS, help="Log in lines of JSON.")] = False,
    otlp_endpoint: Annotated[
        str | None,
        _option(
            rich_help_panel=_LOGS, help="Send OpenTelemetry traces to this collector, e.g. http://localhost:4318."
        ),
    ] = ServerConfig.otlp_endpoint,
    config_file: ConfigFile = None,
) -> None:
    """Serve one base model and its adapters, OpenAI-compatible."""
    if job_memory is not None and sys.platform != "linux":
        raise ConfigError("--job-memory is Linux's: nothing here would keep to it.", field="job_memory")
    model = base or model
    engine = EngineConfig(
        base=BaseSpec(model, quantization, double_quant, device),
        max_model_len=max_model_len,
        cache_gib=cache_gib,
        cache_share=cache_share,
        max_batch_tokens=max_batch_tokens,
        max_running=max_running,
        max_waiting=max_waiting,
        max_adapters=max_adapters,
        reuse_prefixes=prefix_cache,
        head=head,
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
        allowed_origins=tuple(allowed_origins or ()),
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
