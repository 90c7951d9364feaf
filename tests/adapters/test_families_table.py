"""The table of families: each line has its proof, and what is in no line is refused with the reason."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from onebase_adapters.errors import BaseModelError
from onebase_engine.base import families
from onebase_engine.base.base_spec import BaseSpec
from onebase_engine.base.describe import describe_base
from onebase_engine.base.families import FAMILIES, FUSED, class_of, family_of
from onebase_engine.base.load_base import load_base
from onebase_engine.base.mixture import split_mixture
from onebase_engine.base.model_weights import ModelWeights
from onebase_engine.kernels.coded_linear import CodedLinear
from support.models import ENCODERS, save_model, tiny_of
from support.models import FAMILIES as TINY
from support.quantised import quantise

ROOT = Path(__file__).parents[2]
SMALL: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 64}


def test_every_line_has_its_proof() -> None:
    assert FAMILIES.keys() >= FUSED
    for name, family in FAMILIES.items():
        assert family.tiny
        for tiny in family.tiny:
            config = (TINY | ENCODERS)[tiny](64)
            assert class_of(config) == name
            assert family_of(config) is family
        for test, proof in ((family.served, "served"), (family.trained, "trained")):
            text = (ROOT / test).read_text()
            ran = f'tiny_of("{test}", "{proof}")' in text or f'tiny_model("{family.tiny[0]}")' in text
            assert ran, f"{test} does not run {family.tiny}"
    assert {tiny for family in FAMILIES.values() for tiny in family.tiny} == {*TINY, *ENCODERS}


@pytest.mark.parametrize("tiny", tiny_of("tests/parity/test_families.py", "served"))
def test_both_sublayers_of_every_layer_are_known(tiny: str) -> None:
    config = TINY[tiny](64)
    model = transformers.AutoModelForCausalLM.from_config(config)
    split_mixture(model, lambda linear: linear)
    shape = describe_base(model, "tiny", "")
    assert len(shape.sublayers) == 2 * shape.layers
    for name in shape.sublayers:
        parts = {site.rpartition(".")[0] for site in shape.sites}
        assert name in parts, f"{name} has no linear modules of its own"


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (transformers.Llama4TextConfig(**SMALL), "layers of chunked_attention"),
        (transformers.Qwen3NextConfig(**SMALL), "layers of linear_attention"),
        (transformers.MambaConfig(), "layers of|keep a state"),
        (transformers.Mamba2Config(), "layers of|keep a state"),
        (transformers.JambaConfig(), "layers of"),
        (transformers.FalconH1Config(), "layers of|keep a state"),
        (transformers.RecurrentGemmaConfig(), "layers of|keep a state"),
        (transformers.DeepseekV3Config(), "keys and values are compressed"),
        (transformers.FalconConfig(alibi=True), "bias by distance"),
        (transformers.BloomConfig(), "BloomForCausalLM, .* no test here compares"),
        (transformers.GptOssConfig(), "no test here compares"),
        (transformers.RwkvConfig(), "not served"),
        (transformers.BertConfig(is_decoder=True), "BertLMHeadModel, which is not served: no test here"),
        (transformers.GPT2Config(add_cross_attention=True), "attends to an encoder"),
        (transformers.Gemma3TextConfig(use_bidirectional_attention=True), "sees the tokens after each one"),
        (transformers.LlamaConfig(layer_types=["chunked_attention"] * 32), "layers of chunked_attention"),
        (transformers.LlamaConfig(attention_chunk_size=64), "in chunks"),
        (transformers.ViTConfig(), "a vit, which is not served"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, transformers.PreTrainedConfig) else "",
)
def test_what_is_in_no_line_is_refused_with_the_reason(config: Any, reason: str, tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match=reason) as caught:
        family_of(config)
    assert caught.value.field == "model"
    assert "`onebase models` lists what is" in caught.value.message


def test_a_refusal_comes_before_any_weight(tmp_path: Path) -> None:
    transformers.Llama4TextConfig(**SMALL).save_pretrained(tmp_path)
    with pytest.raises(BaseModelError, match=r"Llama4ForCausalLM, which is not served: .* chunked_attention"):
        load_base(BaseSpec(str(tmp_path), device="cpu"))


def test_code_from_a_folder_is_not_run(tmp_path: Path) -> None:
    auto = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "ours", "auto_map": auto}))
    (tmp_path / "code.py").write_text("raise SystemExit('it was run')")
    with pytest.raises(BaseModelError, match=r"of the type 'ours': transformers does not know it without code"):
        load_base(BaseSpec(str(tmp_path), device="cpu"))


def test_the_context_ends_where_the_rotation_would_change(tiny_model: Callable[[str], Path]) -> None:
    told: list[str] = []
    base = load_base(BaseSpec(str(tiny_model("phi3-partial")), device="cpu"), progress=told.append)
    assert base.shape.context == 256
    assert "its rotation changes for sequences of more than 256 tokens: that is its context here" in told
    rotary = base.model.model.rotary_emb
    x = torch.zeros(1)
    cos = [rotary(x, torch.arange(length)[None])[0][0, :200] for length in (200, 256, 257)]
    assert torch.equal(cos[0], cos[1])
    assert not torch.equal(cos[0], cos[2])  # what the context keeps out
    told.clear()
    base = load_base(BaseSpec(str(tiny_model("llama-dynamic")), device="cpu"), progress=told.append)
    assert (base.shape.context, told) == (256, [])
    for length in (256, 300, 100):
        base.model.model.rotary_emb(x, torch.arange(length)[None])
    assert families.steady_positions(base.model.config) == 256


CODED = [
    name for name in tiny_of("tests/parity/test_families.py", "served") if FAMILIES[class_of(TINY[name](64))].codes
]


@pytest.mark.parametrize("name", [name for name in CODED if name != "llama-odd"])
def test_a_familys_own_codes_are_the_very_weights(
    name: str, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    folder, plain = quantise(tiny_model(name), tmp_path / "coded", "gptq")
    base = load_base(BaseSpec(str(folder), device="cpu"))
    expected, weights = load_file(plain / "model.safetensors"), ModelWeights(base.model)
    coded = [module for module, held in base.model.named_modules() if isinstance(held, CodedLinear)]
    assert len(coded) >= 4 * 3
    for module in coded:
        assert torch.equal(weights.weight(module), expected[f"{module}.weight"]), module


def test_codes_of_transposed_modules_are_refused(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "gpt2", "gpt2")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        BaseModelError, match="a GPT2LMHeadModel in GPTQ in 4 bits, groups of 32, which is not read"
    ):
        load_base(BaseSpec(str(folder), device="cpu"))
