"""Adapters of every PEFT method for the tiny models: made and saved by PEFT, with every number random."""

import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import save_file
from transformers import AutoConfig

from onebase_engine.base.load_base import quiet_loading
from support.models import auto_class

_HIDDEN, _LAYERS = 64, 3
"""The tiny Llama's sizes."""
_COMMON: dict[str, Any] = {"task_type": "CAUSAL_LM"}
_SITES = ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]

_TWO = ["q_proj", "v_proj"]
_TOKENS = list(range(5, 105, 2))
"""Those that are retrained: enough for any prompt of the tests to have some."""

_CONFIGS: Mapping[str, Callable[[], peft.PeftConfig]] = {
    "rslora": lambda: peft.LoraConfig(r=6, lora_alpha=12, target_modules=_SITES, use_rslora=True, **_COMMON),
    "dora": lambda: peft.LoraConfig(r=4, lora_alpha=8, target_modules=_SITES, use_dora=True, **_COMMON),
    "lora-bias": lambda: peft.LoraConfig(r=4, target_modules=_SITES, lora_bias=True, **_COMMON),
    "lora-trained-biases": lambda: peft.LoraConfig(r=4, target_modules=_TWO, bias="all", **_COMMON),
    "lora-embedding": lambda: peft.LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"], **_COMMON),
    "lora-saved-head": lambda: peft.LoraConfig(
        r=4, target_modules=["q_proj"], modules_to_save=["lm_head", "embed_tokens"], **_COMMON
    ),
    "adalora": lambda: peft.AdaLoraConfig(
        init_r=6, target_r=3, lora_alpha=12, total_step=10, target_modules=_SITES, **_COMMON
    ),
    "ia3": lambda: peft.IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], **_COMMON
    ),
    "ia3-shared-input": lambda: peft.IA3Config(
        target_modules=["q_proj", "up_proj"], feedforward_modules=["q_proj", "up_proj"], **_COMMON
    ),
    "prompt-tuning": lambda: peft.PromptTuningConfig(num_virtual_tokens=7, **_COMMON),
    "p-tuning-lstm": lambda: peft.PromptEncoderConfig(
        num_virtual_tokens=5, encoder_hidden_size=32, encoder_reparameterization_type="LSTM", **_COMMON
    ),
    "p-tuning-mlp": lambda: peft.PromptEncoderConfig(
        num_virtual_tokens=5, encoder_hidden_size=32, encoder_reparameterization_type="MLP", **_COMMON
    ),
    "prefix-tuning": lambda: peft.PrefixTuningConfig(num_virtual_tokens=19, **_COMMON),
    "prefix-tuning-mlp": lambda: peft.PrefixTuningConfig(
        num_virtual_tokens=16, encoder_hidden_size=48, prefix_projection=True, **_COMMON
    ),
    "multitask-prompt-tuning": lambda: peft.MultitaskPromptTuningConfig(
        num_virtual_tokens=7, num_ranks=2, num_tasks=3, **_COMMON
    ),
    "cpt": lambda: peft.CPTConfig(
        cpt_token_ids=[5, 6, 7, 8, 9],
        cpt_tokens_type_mask=[1, 2, 2, 3, 4],
        opt_projection_epsilon=20.0,
        opt_projection_format_epsilon=10.0,
        **_COMMON,
    ),
    "cartridge": lambda: peft.CartridgeConfig(num_virtual_tokens=19, **_COMMON),
    "trainable-tokens": lambda: peft.TrainableTokensConfig(token_indices=_TOKENS, **_COMMON),
    "lora-trainable-tokens": lambda: peft.LoraConfig(
        r=4, target_modules=["q_proj"], trainable_token_indices=_TOKENS, **_COMMON
    ),
    "beft": lambda: peft.BeftConfig(target_modules=["v_proj"], **_COMMON),
    "poly": lambda: peft.PolyConfig(r=4, n_tasks=3, n_skills=3, n_splits=2, target_modules=_TWO, **_COMMON),
    "loha": lambda: peft.LoHaConfig(r=4, alpha=8, target_modules=_SITES, **_COMMON),
    "lokr": lambda: peft.LoKrConfig(r=4, alpha=8, target_modules=_SITES, **_COMMON),
    "vera": lambda: peft.VeraConfig(r=8, target_modules=["q_proj", "o_proj"], **_COMMON),
    "oft": lambda: peft.OFTConfig(oft_block_size=16, target_modules=_TWO, **_COMMON),
    "hra": lambda: peft.HRAConfig(r=4, target_modules=_TWO, **_COMMON),
    "fourierft": lambda: peft.FourierFTConfig(n_frequency=50, target_modules=_TWO, **_COMMON),
    "randlora": lambda: peft.RandLoraConfig(r=8, target_modules=_TWO, **_COMMON),
    "vblora": lambda: peft.VBLoRAConfig(
        r=4, num_vectors=16, vector_length=16, topk=2, target_modules=_TWO, **_COMMON
    ),
    "miss": lambda: peft.MissConfig(r=8, target_modules=_TWO, **_COMMON),
    "delora": lambda: peft.DeloraConfig(r=4, target_modules=_TWO, **_COMMON),
    "c3a": lambda: peft.C3AConfig(block_size=16, target_modules=_TWO, **_COMMON),
    "waveft": lambda: peft.WaveFTConfig(n_frequency=50, target_modules=_TWO, **_COMMON),
    "gralora": lambda: peft.GraloraConfig(r=8, target_modules=_TWO, **_COMMON),
    "hira": lambda: peft.HiraConfig(r=4, target_modules=_TWO, **_COMMON),
    "glora": lambda: peft.GloraConfig(r=4, target_modules=_TWO, **_COMMON),
    "tinylora": lambda: peft.TinyLoraConfig(u=8, target_modules=_TWO, **_COMMON),
    "pvera": lambda: peft.PveraConfig(r=8, target_modules=_TWO, **_COMMON),
    "unilora": lambda: peft.UniLoraConfig(r=4, theta_d_length=64, target_modules=_TWO, **_COMMON),
    "deft": lambda: peft.DeftConfig(r=4, target_modules=_TWO, **_COMMON),
    "osf": lambda: peft.OSFConfig(effective_rank=8, target_modules=_TWO, **_COMMON),
    "road": lambda: peft.RoadConfig(group_size=16, target_modules=_TWO, **_COMMON),
    "peanut": lambda: peft.PeanutConfig(r=4, target_modules=_TWO, **_COMMON),
}


def of_this_peft(configs: Mapping[str, Callable[[], peft.PeftConfig]]) -> dict[str, Callable[[], peft.PeftConfig]]:
    """Without those of classes that came to PEFT later than this one."""

    def has(make: Callable[[], peft.PeftConfig]) -> bool:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                make()
            except AttributeError as error:
                if "module 'peft' has no attribute" not in str(error):
                    raise
                return False
            return True

    return {name: make for name, make in configs.items() if has(make)}


CONFIGS = of_this_peft(_CONFIGS)
"""By name. The tiny Llama's sites are at most 128 wide, so that even OFT's updates are low-rank enough for it."""

TASKS: Mapping[str, int] = {"multitask-prompt-tuning": 2, "poly": 1}
"""Which of its tasks an adapter is served for, where it holds several."""


def save_named(folder: Path, model: Path, name: str, *, seed: int = 0) -> Path:
    """The adapter `name` of `CONFIGS`. Returns `folder`."""
    save_method(folder, model, CONFIGS[name](), seed=seed)
    if name in TASKS:
        (folder / "onebase.json").write_text(json.dumps({"task": TASKS[name]}))
    return folder


def save_method(folder: Path, model: Path, config: peft.PeftConfig, *, seed: int = 0) -> Path:
    """The adapter `config` describes for the model in `model`. Returns `folder`."""
    with quiet_loading(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = auto_class(AutoConfig.from_pretrained(model)).from_pretrained(model, dtype=torch.float32)
        generator = torch.Generator().manual_seed(seed)
        adapted: Any = peft.get_peft_model(base, config)
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad or "ranknum" in name or "frozen" in name:
                _randomise(name, parameter, generator)
        adapted.save_pretrained(folder)
    return folder


def _randomise(name: str, parameter: torch.Tensor, generator: torch.Generator) -> None:
    noise = torch.randn(parameter.shape, generator=generator)
    with torch.no_grad():
        if "ranknum" in name:
            return
        if "randlora_" in name:  # whose many bases add up to large updates
            parameter.copy_(0.02 * noise)
        elif any(part in name for part in ("ia3_", "magnitude", "vera_lambda", "road_alpha", "osf_")):
            # Around what leaves the base unchanged (1, or a norm), or what VeRA begins with.
            parameter *= 1 + 0.2 * noise if "vera" not in name else 1 + noise
            parameter += 0.3 * noise if "vera_lambda_b" in name else 0
        elif "oft_" in name:
            parameter.copy_(0.05 * noise)
        elif any(part in name for part in ("hada_", "lokr_", "theta_d", "hira_A")):
            parameter.copy_(0.4 * noise)
        elif any(part in name for part in ("prompt_encoder", "embedding.weight", "trainable_tokens")):
            parameter.copy_(0.5 * noise)
        elif "modules_to_save" in name:
            parameter += 0.1 * parameter.std() * noise
        else:
            parameter.copy_(noise * 0.4 / parameter.shape[-1] ** 0.5)
        parameter.copy_(parameter.bfloat16().float())


def save_bottleneck(folder: Path, placement: str, activation: str, size: int) -> Path:
    """A bottleneck adapter for the tiny Llama, in our format. Returns `folder`."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(size)
    tensors = {}
    for layer in range(_LAYERS):
        for block in ("self_attn", "mlp") if placement == "houlsby" else ("mlp",):
            site = f"model.layers.{layer}.{block}"
            shapes = {"down.weight": (size, _HIDDEN), "down.bias": (size,)}
            shapes |= {"up.weight": (_HIDDEN, size), "up.bias": (_HIDDEN,)}
            for leaf, shape in shapes.items():
                noise = torch.randn(shape, generator=generator) * 0.6 / shape[-1] ** 0.5
                tensors[f"{site}.{leaf}"] = noise.bfloat16().float()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "BOTTLENECK", "placement": placement, "activation": activation, "scale": 0.75}
    (folder / "adapter_config.json").write_text(json.dumps(config | {"bottleneck_size": size}))
    return folder
