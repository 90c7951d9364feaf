"""What a base will take is what it takes; one that does not fit is told before loading, with both numbers."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from onebase_adapters.errors import BaseModelError
from onebase_engine.base import load_base as loading
from onebase_engine.base import needed_memory
from onebase_engine.base.base_spec import BaseSpec
from onebase_engine.base.coded_checkpoint import tensor_files
from onebase_engine.base.load_base import load_base, model_bytes, quiet_loading
from onebase_engine.base.needed_memory import base_bytes
from onebase_training.model.base_for_training import load_base as loading_for_training
from support.models import FAMILIES
from support.quantised import quantise, save_gguf

UNCOUNTED, BUFFERS = 64, 1500
"""Bytes of the tiny models' scales of scales, which `model_bytes` leaves out; and of buffers, which no file has."""


def needed(folder: Path, spec: BaseSpec, *, coded: bool = False) -> int:
    return base_bytes(folder, AutoConfig.from_pretrained(folder), spec, coded=coded)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "t5"])
def test_it_is_what_the_loaded_base_takes(family: str, tiny_model: Callable[[str], Path]) -> None:
    spec = BaseSpec(str(tiny_model(family)), device="cpu")
    told = needed(tiny_model(family), spec)
    assert -UNCOUNTED <= model_bytes(load_base(spec).model) - told < BUFFERS


@pytest.mark.parametrize(
    "spec", [BaseSpec("", "fp4", double_quant=False), BaseSpec("", "none")], ids=["fp4", "none"]
)
def test_in_every_form(spec: BaseSpec, tiny_model: Callable[[str], Path]) -> None:
    spec = BaseSpec(str(tiny_model("qwen2")), spec.quantization, spec.double_quant, device="cpu")
    assert -UNCOUNTED <= model_bytes(load_base(spec).model) - needed(tiny_model("qwen2"), spec) < BUFFERS


@pytest.mark.parametrize(
    "layout",
    ["gptq", "gptq-act-order", "awq", "compressed", "compressed-float8", "bitsandbytes", "Q4_0", "Q4_1", "Q8_0"],
)
def test_of_codes(
    layout: str, tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ONEBASE_CACHE", str(tmp_path / "cache"))
    if layout == "bitsandbytes":
        folder = tmp_path / "saved"
        settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
        with quiet_loading():
            AutoModelForCausalLM.from_pretrained(
                tiny_model("llama"), quantization_config=settings, dtype=torch.bfloat16, device_map={"": "cpu"}
            ).save_pretrained(folder)
        for path in tiny_model("llama").glob("token*"):
            (folder / path.name).write_bytes(path.read_bytes())
    elif layout.startswith("Q"):
        file = tmp_path / "model.gguf"
        save_gguf(tiny_model("qwen3"), file, layout)
        folder = loading.fetch_base(str(file))
    else:
        folder, _ = quantise(tiny_model("llama"), tmp_path / "coded", layout)
    spec = BaseSpec(str(folder), device="cpu")
    told, taken = needed(folder, spec, coded=True), model_bytes(load_base(spec).model)
    assert 0.9 * taken < told <= taken


def test_a_base_that_does_not_fit_is_told_before_loading(
    tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = BaseSpec(str(tiny_model("llama")), quantization="none", device="cpu")
    taken = needed(tiny_model("llama"), spec)
    monkeypatch.setattr(needed_memory, "free_memory", lambda _: taken)
    assert load_base(spec).shape.name == spec.model  # to the byte
    monkeypatch.setattr(needed_memory, "free_memory", lambda _: taken - 1)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("it was loaded"))
    for load in (load_base, loading_for_training):
        with pytest.raises(BaseModelError) as caught:
            load(spec)
        assert f"in bfloat16 takes {taken / 2**30:.2f} GiB of memory, and cpu has" in caught.value.message
        assert "hold it in 4 bits (--quantization nf4), choose a smaller base" in caught.value.message


def test_a_gguf_file_that_does_not_fit_is_told_before_it_is_read(
    tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ONEBASE_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "model.gguf"
    save_gguf(tiny_model("qwen3"), file, "Q4_0")
    monkeypatch.setattr(needed_memory, "free_memory", lambda _: 1000)
    with pytest.raises(BaseModelError, match=r"Reading model\.gguf takes 0\.00 GiB of memory, and cpu has"):
        load_base(BaseSpec(str(file), device="cpu"))
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_the_same_weights_under_other_names_are_not_counted(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = tmp_path / "twice"
    folder.mkdir()
    for path in tiny_model("mistral").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "consolidated.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    assert {path.name for path in tensor_files(folder).values()} == {"model.safetensors"}
    spec = BaseSpec(str(folder), device="cpu")
    assert needed(folder, spec) == needed(tiny_model("mistral"), spec)


def test_what_is_in_the_files_and_not_held_is_not_counted(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    """A tied head, copies of T5's embedding, GPT-2's masks."""
    extra = {
        "gpt2": {"transformer.h.0.attn.bias": torch.ones(1, 1, 256, 256), "lm_head.weight": torch.ones(416, 64)},
        "t5": {f"{part}.embed_tokens.weight": torch.ones(416, 64) for part in ("encoder", "decoder")},
    }
    for family, more in extra.items():
        folder = tmp_path / family
        folder.mkdir()
        for path in tiny_model(family).iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        save_file(load_file(folder / "model.safetensors") | more, folder / "model.safetensors", {"format": "pt"})
        spec = BaseSpec(str(folder), device="cpu")
        assert needed(folder, spec) == needed(tiny_model(family), spec)
        load_base(spec)
