"""A fine-tuned model minus its base: the adapter gives the fine-tuned model's logits again."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from onebase.cli.adapters import extract_folders
from onebase_adapters.errors import AdapterMismatchError, ConfigError
from onebase_engine.base.base_spec import BaseSpec
from onebase_engine.base.load_base import quiet_loading
from onebase_engine.runner.batched_model import ServedModel
from support.peers import logits
from support.serving import Feeder, Stream, put


@pytest.fixture(scope="module")
def finetuned(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every matrix changed by rank 3, every norm by a little."""
    folder = tmp_path_factory.mktemp("finetuned") / "model"
    generator = torch.Generator().manual_seed(5)
    with quiet_loading():
        model = AutoModelForCausalLM.from_pretrained(tiny_model("llama"), dtype=torch.float32)
        for parameter in model.parameters():
            with torch.no_grad():
                if parameter.dim() == 1:
                    parameter *= 1 + 0.1 * torch.randn(parameter.shape, generator=generator)
                else:
                    rows, columns = parameter.shape
                    left = torch.randn(rows, 3, generator=generator)
                    right = torch.randn(3, columns, generator=generator)
                    parameter += 0.3 * parameter.std() * left @ right / 3**0.5
        model.to(torch.bfloat16).save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes((tiny_model("llama") / "tokenizer.json").read_bytes())
    return folder


def test_all_of_a_full_rank_difference_is_served(
    finetuned: Path, tiny_model: Callable[[str], Path], tmp_path: Path, prompt: Any
) -> None:
    result = extract_folders(finetuned, str(tiny_model("llama")), tmp_path / "adapter", rank=128)
    assert result.error < 1e-3
    assert result.untouched == ()
    tokens = prompt(30, 2)
    with quiet_loading():
        exact = logits(AutoModelForCausalLM.from_pretrained(finetuned, dtype=torch.float32), tokens)
    spec = BaseSpec(str(tiny_model("llama")), quantization="none", device="cpu")
    model = ServedModel.load(spec, slots=2, blocks=32)
    (ours,) = Feeder(model).logits([Stream(tokens, put(model, tmp_path / "adapter"))])
    assert float((ours - exact).norm() / exact.norm()) < 0.04


def test_a_lower_rank_tells_its_error_and_loads_in_peft(
    finetuned: Path, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    result = extract_folders(finetuned, str(tiny_model("llama")), tmp_path / "adapter", rank=2)
    assert 0.1 < result.error < 1
    with quiet_loading():
        base = AutoModelForCausalLM.from_pretrained(tiny_model("llama"), dtype=torch.float32)
    with pytest.warns(UserWarning, match="tie"):
        PeftModel.from_pretrained(base, tmp_path / "adapter")


def test_another_architecture_and_a_taken_output_are_refused(
    finetuned: Path, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(AdapterMismatchError, match="not a fine-tune"):
        extract_folders(finetuned, str(tiny_model("qwen2")), tmp_path / "adapter", rank=2)
    (tmp_path / "taken").mkdir()
    with pytest.raises(ConfigError, match="exists"):
        extract_folders(finetuned, str(tiny_model("llama")), tmp_path / "taken", rank=2)
