"""Prompt tuning (Lester et al. 2021): learned embeddings in front of the prompt."""

import torch
from peft import PromptTuningConfig, PromptTuningInit

from onebase_contract.settings import TrainConfig
from onebase_engine.base.load_base import LoadedBase
from onebase_training.methods.peft_parts import put_peft, task_type
from onebase_training.model.attached import Attached

LEARNING_RATE = 3e-2
"""Measured, see docs/decisions/0044. The paper has 0.3, with Adafactor and far larger bases."""


def attach(base: LoadedBase, config: TrainConfig, steps: int) -> Attached:
    """`prompt_length` embeddings, float32."""
    settings = PromptTuningConfig(
        num_virtual_tokens=config.prompt_length,
        prompt_tuning_init=PromptTuningInit.SAMPLE_VOCAB,
        task_type=task_type(base),
        num_transformer_submodules=1,  # of an encoder-decoder PEFT would keep as many unread ones for the decoder
    )
    parts = put_peft(base, settings, rounded=("prompt_embeddings",))
    encoder = parts.peft.prompt_encoder["default"]
    _initialise(encoder.embedding.weight, base, config)
    return Attached(
        base.model,
        parts.save,
        parts.load,
        extra=parts.peft.prompt_encoder,
        virtual=lambda: parts.peft.get_prompt(1)[0],
        places=(0,) * config.prompt_length,
    )


def _initialise(weight: torch.Tensor, base: LoadedBase, config: TrainConfig) -> None:
    """In place; PEFT has put random tokens' embeddings there."""
    embedding = base.model.get_input_embeddings()
    with torch.no_grad():
        if config.prompt_init == "random":
            # PEFT's own noise has spread 1, many times that of real embeddings.
            weight.normal_(std=float(embedding.weight.float().std()))
        elif config.prompt_init == "text":
            weight.copy_(embedding(text_tokens(base, config).to(weight.device)))


def text_tokens(base: LoadedBase, config: TrainConfig) -> torch.Tensor:
    """int64 [prompt_length], the prompt_text's, repeated or cut."""
    ids = base.tokenizer(config.prompt_text, add_special_tokens=False)["input_ids"]
    return torch.tensor((ids * -(-config.prompt_length // len(ids)))[: config.prompt_length])
