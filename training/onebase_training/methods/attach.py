"""The methods by their names: one line each."""

from collections.abc import Callable
from dataclasses import dataclass

import peft

from onebase_adapters.errors import ConfigError, did_you_mean
from onebase_adapters.formats.checks import check_folder
from onebase_adapters.formats.read_adapter import check_base, read_adapter
from onebase_contract.settings import TrainConfig
from onebase_engine.base.base_spec import Quantization
from onebase_engine.base.load_base import LoadedBase
from onebase_training.methods import (
    adalora,
    bottleneck,
    dora,
    full,
    hra,
    ia3,
    lora,
    p_tuning,
    pissa,
    prefix_tuning,
    prompt_tuning,
    rslora,
)
from onebase_training.methods.deltas import delta
from onebase_training.model.attached import Attached

Attach = Callable[[LoadedBase, TrainConfig, int], Attached]


@dataclass(frozen=True)
class Method:
    """How a method is trained."""

    about: str
    learning_rate: float | None
    """The default."""
    attach: Attach | None
    """Puts it on the base, given the run's number of steps. Raises ConfigError. None: it has no parameters."""
    quantization: Quantization = "nf4"
    """Quantization of the base while it trains."""
    expanded: bool = False
    """Needs the base's weights as plain matrices, not in 4 bits."""
    head: bool = False
    """Always trains a classifier."""
    rank: int | None = None
    """The default of those whose rank is worth tuning."""


METHODS: dict[str, Method] = {
    "qlora": Method("low-rank updates on the 4-bit base", lora.LEARNING_RATE, lora.attach, rank=lora.RANK),
    "lora": Method(
        "low-rank updates on the bfloat16 base", lora.LEARNING_RATE, lora.attach, "none", rank=lora.RANK
    ),
    "rslora": Method("LoRA with a scale for large ranks", lora.LEARNING_RATE, rslora.attach, rank=lora.RANK),
    "dora": Method("LoRA with trained magnitudes", dora.LEARNING_RATE, dora.attach, expanded=True, rank=lora.RANK),
    "pissa": Method(
        "LoRA from principal components", pissa.LEARNING_RATE, pissa.attach, expanded=True, rank=lora.RANK
    ),
    "adalora": Method(
        "LoRA with ranks by need", adalora.LEARNING_RATE, adalora.attach, expanded=True, rank=adalora.RANK
    ),
    "ia3": Method("trained factors of activations", ia3.LEARNING_RATE, ia3.attach, expanded=True),
    "prompt-tuning": Method("embeddings before the prompt", prompt_tuning.LEARNING_RATE, prompt_tuning.attach),
    "p-tuning": Method("embeddings in the prompt, by an encoder", p_tuning.LEARNING_RATE, p_tuning.attach),
    "prefix-tuning": Method("keys and values in every layer", prefix_tuning.LEARNING_RATE, prefix_tuning.attach),
    "p-tuning-v2": Method(
        "a prefix and a classifier", prefix_tuning.LEARNING_RATE, prefix_tuning.attach, head=True
    ),
    "bottleneck": Method("small layers behind the blocks", bottleneck.LEARNING_RATE, bottleneck.attach),
    "loha": Method(
        "Hadamard products of low ranks", 5e-3, delta(peft.LoHaConfig, 8, alpha=16), expanded=True, rank=8
    ),
    "lokr": Method(
        # A first factor of up to 16 by 16: with the second's rank of 8 the change has no more rank than is served.
        "Kronecker products",
        3e-3,
        delta(peft.LoKrConfig, 8, alpha=16, decompose_factor=16),
        expanded=True,
        rank=8,
    ),
    "vera": Method("scales of fixed random matrices", 3e-2, delta(peft.VeraConfig, 128), expanded=True),
    "oft": Method("rotations", 1e-3, delta(peft.OFTConfig, oft_block_size=32), expanded=True),
    "hra": Method("reflections", hra.LEARNING_RATE, hra.attach, expanded=True, rank=hra.RANK),
    "hard-prompt": Method("wording and examples, chosen among candidates", None, None),
    "full": Method("all weights", full.LEARNING_RATE, full.attach, "none", expanded=True),
}


def find_method(name: str) -> Method:
    """Raises ConfigError."""
    if name not in METHODS:
        there = f"There are {', '.join(METHODS)}."
        raise ConfigError(f"No method {name!r}{did_you_mean(name, METHODS)}. {there}", field="method")
    return METHODS[name]


def start_from(attached: Attached, base: LoadedBase, config: TrainConfig) -> None:
    """Begin with `config.init_from`. Raises AdapterError and its branches, or ConfigError."""
    if config.init_from is None:
        return
    files = read_adapter(config.init_from)
    check_base(files, base.shape)
    check_folder(config.init_from, base.tokenizer.get_vocab())
    trained_by = files.sidecar.get("method", config.method)
    if attached.load is None or trained_by != config.method:
        raise ConfigError(
            f"{config.method} cannot start from an adapter of {trained_by}."
            if attached.load is not None
            else f"{config.method} cannot start from an adapter: what it trains is not what is stored.",
            field="init_from",
        )
    attached.load({name: value for name, value in files.tensors.items() if not name.startswith("score.")})
