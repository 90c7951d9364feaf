"""Loading the base: one call, the same for serving and training, so that both work on the very same weights."""

import json
import logging
from collections.abc import Iterator
from collections.abc import Sequence as Items
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from onebase_adapters.base_shape import BaseShape
from onebase_adapters.errors import BaseModelError
from onebase_engine.base.base_spec import BaseSpec
from onebase_engine.base.catalog import fetch_base
from onebase_engine.base.coded_checkpoint import Layout, layout_of, load_coded
from onebase_engine.base.describe import describe_base, is_encoder
from onebase_engine.base.families import class_of, family_of, steady_positions
from onebase_engine.base.fingerprint import fingerprint_folder
from onebase_engine.base.mixture import is_mixture, split_mixture
from onebase_engine.base.needed_memory import check_memory
from onebase_engine.base.package_files import Progress
from onebase_engine.kernels.bitsandbytes_import import Params4bit
from onebase_engine.kernels.coded_linear import CodedLinear
from onebase_engine.kernels.device import resolve_device
from onebase_engine.kernels.lean_imports import without_compiler
from onebase_engine.kernels.linear4bit import choose_packing, in_4bit

with without_compiler():
    import transformers
    from transformers import (
        AutoConfig,
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForSeq2SeqLM,
        AutoTokenizer,
        BitsAndBytesConfig,
        GenerationConfig,
        PreTrainedModel,
        PreTrainedTokenizerBase,
    )
    from transformers import masking_utils as masking_utils  # asks for the compiler
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME
    from transformers.utils import logging as transformers_logging

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedBase:
    """A frozen model with its tokenizer and its shape."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    shape: BaseShape
    device: torch.device
    held: str = "bfloat16"
    """How its linear weights are held, for people."""
    coded: bool = False
    """Whether the checkpoint itself was in 4 bits."""


def load_base(spec: BaseSpec, *, attention: str | None = None, progress: Progress = log.info) -> LoadedBase:
    """Fetch if need be, quantise, freeze. `attention` is a name known to transformers' AttentionInterface, by
    default `plain_attention` (an encoder-decoder keeps that).

    Raises BaseModelError and its branches, or StorageError.
    """
    folder = fetch_base(spec.model, progress=progress)
    device = resolve_device(spec.device)
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        torch.cuda.set_device(device)  # where kernels are launched that name no device
    options: dict[str, Any] = {}
    layout: Layout | None = None
    if spec.quantization != "none":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=spec.quantization,
            bnb_4bit_compute_dtype=torch.bfloat16,
            bnb_4bit_use_double_quant=spec.double_quant,
        )
    try:
        # Making a model's modules asks for the compiler, too.
        with quiet_loading(), without_compiler():
            config = _read_config(folder)
            family, mixture = family_of(config), is_mixture(config)
            tokenizer = AutoTokenizer.from_pretrained(folder)
            loader = AutoModel if is_encoder(config) else AutoModelForCausalLM
            if config.is_encoder_decoder:
                loader, attention = AutoModelForSeq2SeqLM, None
            attention = attention or plain_attention(getattr(transformers, class_of(config)))
            settings = {"dtype": torch.bfloat16, "attn_implementation": attention}
            quantized = _quantized_by(config)
            if quantized is not None and quantized.get("load_in_4bit"):
                options = {}
            elif quantized is not None:
                layout = layout_of(quantized)
                if not family.codes:
                    raise BaseModelError(
                        f"{spec.model!r} is a {class_of(config)} in {layout.name}, which is not read for this "
                        "class: give its plain weights.",
                        field="model",
                    )
                del config.quantization_config
            check_memory(folder, config, spec, device, coded=quantized is not None)
            if layout is not None:
                progress(f"its weights are {layout.name} already: kept as they are")
                model = load_coded(folder, layout, lambda: loader.from_config(config, **settings), device)
                if (folder / GENERATION_CONFIG_NAME).is_file():
                    model.generation_config = GenerationConfig.from_pretrained(folder)
            else:
                model = loader.from_pretrained(
                    folder, config=config, device_map={"": device}, **settings, **options
                )
        _check_sizes(model)
        if mixture:
            kind, double = _four_bits(spec, quantized)
            split_mixture(model, lambda each: each if kind == "none" else in_4bit(each, kind, double_quant=double))
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise BaseModelError(f"Cannot load {spec.model!r}: {error}", field="model") from error
    if is_encoder(config) and getattr(model, "pooler", None) is not None:
        model.pooler = None  # reads one token alone; heads of ours read the hidden states
    model.eval()
    model.requires_grad_(False)
    choose_packing(model)
    if spec.quantization != "none":
        _let_go_of_files(model)
    shape = describe_base(model, spec.model, fingerprint_folder(folder))
    text = config.get_text_config()
    steady = steady_positions(text)
    if steady is not None and steady < text.max_position_embeddings:
        progress(f"its rotation changes for sequences of more than {steady} tokens: that is its context here")
    held = layout.name if layout else _held(spec, quantized)
    return LoadedBase(model, tokenizer, shape, device, held, coded=quantized is not None)


def _read_config(folder: Path) -> Any:
    """Raises BaseModelError for a kind of model that transformers itself does not know: its code is not run."""
    kind = json.loads((folder / CONFIG_NAME).read_text()).get("model_type")
    if kind not in CONFIG_MAPPING_NAMES:
        raise BaseModelError(
            f"Cannot load a base of the type {kind!r}: transformers does not know it without code from its folder, "
            "and such code is not run. `onebase models` lists what is served.",
            field="model",
        )
    return AutoConfig.from_pretrained(folder)


def plain_attention(model: Any) -> str:
    """The attention of transformers' own that a model or its class runs with: torch's, if it has all of it. It has
    no caps on scores, as Gemma 2 needs."""
    return "sdpa" if model._supports_sdpa else "eager"


def _quantized_by(config: Any) -> dict[str, Any] | None:
    """The `quantization_config` of a checkpoint that is quantised already."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        return None
    settings: dict[str, Any] = found if isinstance(found, dict) else found.to_dict()
    return settings


def _four_bits(spec: BaseSpec, quantized: dict[str, Any] | None) -> tuple[str, bool]:
    """bitsandbytes' type, or "none", and whether its scales are quantised, too."""
    if quantized:
        return quantized["bnb_4bit_quant_type"], quantized["bnb_4bit_use_double_quant"]
    return spec.quantization, spec.double_quant


def _held(spec: BaseSpec, quantized: dict[str, Any] | None) -> str:
    kind, double = _four_bits(spec, quantized)
    if kind == "none":
        return "bfloat16"
    return kind.upper() + (" with double quantisation" if double else "")


def _check_sizes(model: torch.nn.Module) -> None:
    """transformers 5.17 takes weights of other sizes than the configuration's without a word."""
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and not isinstance(module, CodedLinear):
            shape = tuple((getattr(module.weight, "quant_state", None) or module.weight).shape)
            wanted = (module.out_features, module.in_features)
            if shape != wanted:
                raise ValueError(f"the weight of {name} is {shape}, but by config.json it is {wanted}")


def _let_go_of_files(model: torch.nn.Module) -> None:
    """What is not quantised still lies in the mapped files, and holds all of their pages in memory."""
    for parameter in model.parameters():
        if parameter.is_floating_point() and not isinstance(parameter, Params4bit):
            parameter.data = parameter.data.clone()


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Without transformers' weight bars."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def model_bytes(model: torch.nn.Module) -> int:
    """Memory of a model's parameters and buffers, quantisation constants included, in bytes."""
    total = 0
    for tensor in {t.data_ptr(): t for t in [*model.parameters(), *model.buffers()]}.values():
        total += tensor.numel() * tensor.element_size()
        state = getattr(tensor, "quant_state", None)
        if state is not None:
            total += state.absmax.numel() * state.absmax.element_size()
    coded = (module.coded for module in model.modules() if isinstance(module, CodedLinear))
    return total + sum(weight.bytes - weight.codes.nbytes for weight in coded)


def end_tokens(model: torch.nn.Module, tokenizer_eos: int | None) -> Items[int]:
    """The model's end tokens, as its generation configuration has them, and the tokenizer's."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    tokens = [configured] if isinstance(configured, int) else list(configured or [])
    return tokens if tokenizer_eos is None or tokenizer_eos in tokens else [*tokens, tokenizer_eos]


def load_full(folder: Path) -> PreTrainedModel:
    """A causal language model with all of its weights in bfloat16, on the CPU. Raises BaseModelError for a mixture
    of experts, whose fine-tunes no adapter is made of."""
    if is_mixture(AutoConfig.from_pretrained(folder)):
        raise BaseModelError(f"{folder} is a mixture of experts: serve its fine-tune as a base.", field="model")
    with quiet_loading():
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    return model
