"""Prefix tuning (Li and Liang 2021) and P-tuning v2 (Liu et al. 2022), which is the same with a classifier on top:
learned keys and values in front of every layer.

They begin as the base's own for some tokens (Li and Liang, section 7.4): it then works from the first step on, as
if it had read those tokens.
"""

from typing import Any

import torch
from peft import PrefixTuningConfig, initialize_kv_prefix_from_past_key_values
from transformers import DynamicCache

from onebase_adapters.errors import ConfigError
from onebase_contract.settings import TrainConfig
from onebase_engine.base.load_base import LoadedBase, plain_attention
from onebase_training.methods.peft_parts import put_peft, task_type
from onebase_training.methods.prompt_tuning import text_tokens
from onebase_training.model.attached import Attached

LEARNING_RATE = 1e-2
"""Measured, see docs/decisions/0055: keys and values themselves are trained, and take far more than weights do."""


def attach(base: LoadedBase, config: TrainConfig, steps: int) -> Attached:
    """`prompt_length` keys and values a layer, float32; made by an MLP while training if `encoder` is `mlp`."""
    if config.encoder == "lstm":
        raise ConfigError("A prefix is made by an mlp, or by none.", field="encoder")
    if config.checkpointing == "always":
        raise ConfigError(
            "Recomputing activations drops a prefix: use --checkpointing never.", field="checkpointing"
        )
    settings = PrefixTuningConfig(
        num_virtual_tokens=config.prompt_length,
        prefix_projection=config.encoder == "mlp",
        encoder_hidden_size=config.encoder_size or base.shape.hidden,
        task_type=task_type(base),
    )
    parts = put_peft(base, settings, rounded=("prompt_embeddings",))
    if config.encoder != "mlp":
        _initialise(parts.peft, base, config)
    elif config.prompt_init == "text":
        raise ConfigError("What an mlp makes cannot begin with a text: use --encoder none.", field="prompt_init")
    return Attached(
        base.model,
        parts.save,
        parts.load,
        extra=parts.peft.prompt_encoder,
        prefix=lambda rows: parts.peft.get_prompt(rows),
        prefix_length=config.prompt_length,
    )


def _initialise(peft: Any, base: LoadedBase, config: TrainConfig) -> None:
    """In place; PEFT has put noise of spread 1 there."""
    if config.prompt_init == "random":
        peft.prompt_encoder["default"].embedding.weight.data.mul_(_SPREAD)
        return
    if config.prompt_init == "text":
        ids = text_tokens(base, config)
    else:
        ids = torch.randint(base.shape.vocab, (config.prompt_length,))
    initialize_kv_prefix_from_past_key_values(peft, past_key_values=_read(base, ids))


_SPREAD = 0.1
"""Spread of random keys and values. PEFT's 1 disturbs the base so much that training must first undo it."""


@torch.no_grad()
def _read(base: LoadedBase, ids: torch.Tensor) -> DynamicCache:
    """Every layer's keys and values of tokens [n] that stand first."""
    backbone: Any = base.model.base_model
    usual = base.model.config._attn_implementation
    base.model.set_attn_implementation(plain_attention(base.model))
    cache = DynamicCache()  # without the model's settings: it keeps all, whatever a layer's window
    places = torch.arange(len(ids), device=base.device) + base.shape.first_position
    backbone(input_ids=ids[None].to(base.device), position_ids=places[None], past_key_values=cache, use_cache=True)
    base.model.set_attn_implementation(usual)
    return cache
