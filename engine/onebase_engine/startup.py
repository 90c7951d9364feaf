"""Load the base, size the cache, choose the runner: all that comes before the first step."""

import ctypes

import psutil
import torch

from onebase_adapters.errors import ConfigError
from onebase_engine.base.describe import cache_shape
from onebase_engine.engine_config import EngineConfig
from onebase_engine.kernels.batch import BLOCK


def _give_back_memory() -> None:
    """What loading has used and freed: glibc keeps it otherwise, which is more than a small model."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _cache_blocks(config: EngineConfig, model_config: object, device: torch.device) -> int:
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
