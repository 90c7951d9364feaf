"""From a configuration to a running engine: load the base, size the cache, choose the runner, warm up."""

import ctypes
import logging
from collections.abc import Callable

import psutil
import torch

from onebase_adapters.errors import ConfigError
from onebase_engine.base.describe import cache_shape
from onebase_engine.base.load_base import end_tokens, load_base, model_bytes
from onebase_engine.base.package_files import Progress
from onebase_engine.cache.block_pool import BlockPool
from onebase_engine.engine import Engine
from onebase_engine.engine_config import EngineConfig
from onebase_engine.engine_info import EngineInfo
from onebase_engine.grammar import Grammars
from onebase_engine.kernels.batch import BLOCK
from onebase_engine.kernels.choose import start_build
from onebase_engine.kernels.interface import Build
from onebase_engine.residency.resident_adapters import Residency
from onebase_engine.runner.batched_model import ServedModel
from onebase_engine.runner.encoder_decoder import EncoderDecoder
from onebase_engine.runner.paged_attention import ATTENTION_NAME, register_attention
from onebase_engine.scheduling.scheduler import Scheduler
from onebase_engine.start_phases import Phases

log = logging.getLogger(__name__)


def _nothing() -> None:
    pass


def start_engine(
    config: EngineConfig,
    *,
    wake: Callable[[], None] = _nothing,
    progress: Progress = log.info,
    phases: Phases | None = None,
    kernels: Build | None = None,
) -> Engine:
    """Load the base and take the cache's memory. `wake` is called, from another thread, when a step may find
    something new to do; `phases` are those of a start that has begun, `kernels` are being compiled already.

    Raises BaseModelError or ConfigError."""
    phases = phases or Phases(progress)
    phases.begin("loading weights")
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    register_attention()
    base = load_base(config.base, attention=ATTENTION_NAME, progress=phases.tell)
    shape = base.shape
    phases.begin("preparing weights")
    kernels = kernels or start_build(base.device.type, phases.tell)
    if kernels is not None:
        kernels.wait()
    blocks = _cache_blocks(config, base.model.config, base.device)
    model: ServedModel | EncoderDecoder
    if shape.encoder_decoder:
        model = EncoderDecoder(base, slots=config.max_adapters)
    else:
        model = ServedModel(base, slots=config.max_adapters, blocks=blocks, head=config.head)
    phases.begin("warming up")
    model.warm_up(all_kinds=kernels is None or kernels.over)
    _give_back_memory()
    context = min(config.max_model_len or shape.context, shape.context)
    whole_prompts = shape.encoder or shape.encoder_decoder
    scheduler = Scheduler(
        BlockPool(blocks, BLOCK, reuse=config.reuse_prefixes and not shape.encoder_decoder),
        max_batch_tokens=max(config.max_batch_tokens, context if whole_prompts else 1),
        max_running=config.max_running,
        whole_prompts=whole_prompts,
    )
    ends = end_tokens(base.model, base.tokenizer.eos_token_id)
    tokenizer = base.tokenizer
    grammars = Grammars(lambda: str(tokenizer.backend_tokenizer.to_str()), shape.vocab, ends, wake)
    phases.end()
    log.info(
        "the engine is loaded",
        extra={"fields": {part.replace(" ", "_"): round(took, 2) for part, took in phases.seconds.items()}},
    )
    info = EngineInfo(
        model=shape.name,
        fingerprint=shape.fingerprint,
        model_type=shape.model_type,
        quantization=base.held,
        device=str(base.device),
        vocab=shape.vocab,
        context=context,
        generates=not shape.encoder,
        cache_tokens=blocks * BLOCK,
        weight_bytes=model_bytes(base.model),
        cache_bytes=blocks * BLOCK * cache_shape(base.model.config).token_bytes,
        eos_token_ids=tuple(sorted(set(ends))),
        load_seconds=phases.seconds,
        max_adapters=config.max_adapters,
        width=shape.hidden,
    )
    return Engine(model, scheduler, Residency(model, wake), grammars, info)


def _give_back_memory() -> None:
    """What loading has used and freed: glibc keeps it otherwise, which is more than a small model."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _cache_blocks(config: EngineConfig, model_config: object, device: torch.device) -> int:
    if config.cache_tokens is not None:
        return -(-config.cache_tokens // BLOCK)
    if config.cache_gib is not None:
        memory = config.cache_gib * 2**30
    elif device.type == "cuda":
        memory = torch.cuda.mem_get_info(device)[0] * config.cache_share
    else:
        memory = psutil.virtual_memory().available * config.cache_share
    blocks = int(memory / (cache_shape(model_config).token_bytes * BLOCK))
    if blocks < 1:
        raise ConfigError(f"A KV cache of {memory / 2**20:.1f} MiB holds no block.", field="cache_gib")
    return blocks
