"""A prefix that begins with a text's keys and values: the base then answers as if it had read that text."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from onebase_adapters.errors import ConfigError
from onebase_contract.settings import TrainConfig
from onebase_engine.base.base_spec import BaseSpec
from onebase_engine.base.load_base import load_base
from onebase_training.data import NO_LOSS, Encoded, Example
from onebase_training.methods import prefix_tuning
from onebase_training.model.attached import Attached
from onebase_training.model.packed_attention import PACKED_ATTENTION
from onebase_training.model.trained_model import Trained


def config(folder: Path, **options: Any) -> TrainConfig:
    return TrainConfig(
        data=folder, output=folder, method="prefix-tuning", prompt_init="text", prompt_text="a bee", **options
    )


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "glm"])
def test_it_begins_as_if_the_text_had_been_read(
    family: str, tmp_path: Path, tiny_model: Callable[[str], Path]
) -> None:
    base = load_base(BaseSpec(str(tiny_model(family)), quantization="none", device="cpu"))
    base.model.set_attn_implementation(PACKED_ATTENTION)
    read = base.tokenizer("a bee", add_special_tokens=False)["input_ids"]

    def loss(attached: Attached, before: list[int]) -> torch.Tensor:
        ids = (*before, 7, 11, 5, 3)
        example = Encoded(ids, (NO_LOSS,) * (len(ids) - 3) + ids[-3:], Example(1), len(ids) - 3)
        model = Trained(attached, base.device, arithmetic="float32")
        with torch.no_grad():
            found: torch.Tensor = model(**model.collate([example, example]))
        return found

    wanted = loss(Attached(base.model, lambda _: None), read)
    attached = prefix_tuning.attach(base, config(tmp_path, prompt_length=len(read)), 1)
    assert float(loss(attached, [])) == pytest.approx(float(wanted), rel=0.02)
    with pytest.raises(ConfigError, match="mlp"):
        prefix_tuning.attach(base, config(tmp_path, encoder="mlp"), 1)
