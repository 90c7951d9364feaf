"""The base in the method's format and the run's arithmetic, with the attention that fits the device."""

from typing import Any

import torch

from onebase_adapters.errors import ConfigError
from onebase_contract.events import Progress, Stage
from onebase_contract.settings import Arithmetic, TrainConfig
from onebase_engine.base.base_spec import BaseSpec, Quantization
from onebase_engine.base.load_base import LoadedBase, load_base
from onebase_engine.kernels.device import free_memory
from onebase_training.model.arithmetic import DTYPES
from onebase_training.model.encoder_decoder_batches import PAIRED_METHODS
from onebase_training.model.frozen_weights import expand_in_passes, held_bytes, hold
from onebase_training.model.packed_attention import PACKED_ATTENTION


def load_for_training(
    config: TrainConfig,
    quantization: Quantization,
    arithmetic: Arithmetic,
    progress: Progress,
    *,
    expanded: bool = False,
) -> LoadedBase:
    """The base in the method's format, with the attention that fits the device.

    `expanded`: the method needs weights as plain matrices. Raises BaseModelError or ConfigError."""
    spec = BaseSpec(config.model, quantization=quantization, device=config.device)
    threads = torch.get_num_threads()
    base = load_base(spec, progress=lambda text: progress(Stage(text)))
    # numba's OpenMP has made it the number of cores, whatever OMP_NUM_THREADS (torchrun's: 1) says.
    torch.set_num_threads(threads)
    if base.shape.encoder_decoder and (config.method not in PAIRED_METHODS or config.head):
        raise ConfigError(
            f"{config.model} is an encoder-decoder: it trains with {', '.join(PAIRED_METHODS)}, and no classifier.",
            field="head" if config.head else "method",
        )
    text = base.model.config.get_text_config()
    if not base.shape.encoder_decoder and (base.device.type == "cpu" or beyond_masks(text)):
        base.model.set_attn_implementation(PACKED_ATTENTION)
    dtype = DTYPES[arithmetic]
    extra = held_bytes(base.model, dtype)
    expanded = expanded or config.spread_weights or bool(config.modules_to_save)
    if expanded and extra and config.dequantize == "never":
        raise ConfigError(
            f"{config.method} needs the base's weights expanded here.",
            field="dequantize",
        )
    roomy = config.dequantize == "auto" and dtype == torch.bfloat16 and extra * 4 <= free_memory(base.device)
    if extra and (expanded or config.dequantize == "always" or roomy):
        hold(base.model, dtype)
        progress(Stage(f"frozen weights held as {arithmetic}: the same values, {extra >> 20} MiB more"))
    elif extra:
        expand_in_passes(base.model, dtype)
        progress(Stage(f"frozen weights are expanded to {arithmetic} for each product"))
    return base


def beyond_masks(config: Any) -> bool:
    """Whether a decoder's attention is more than products and the mask of a packed row, which is the same for all
    layers: windows in some, or a cap on scores."""
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"]
    windowed = bool(getattr(config, "sliding_window", None)) and "sliding_attention" in kinds
    return windowed or getattr(config, "attn_logit_softcapping", None) is not None
