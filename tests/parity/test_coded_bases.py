"""Checkpoints in 4 bits, as GPTQ, AWQ and compressed-tensors write them: served exactly as they are, with adapters
in one batch, against PEFT on the same weights as plain numbers."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from onebase_adapters.errors import BaseModelError
from onebase_contract.settings import TrainConfig
from onebase_engine.base.base_spec import BaseSpec
from onebase_engine.base.load_base import load_base, quiet_loading
from onebase_engine.base.model_weights import ModelWeights
from onebase_engine.kernels.coded_linear import CodedLinear
from onebase_engine.runner.batched_model import ServedModel
from onebase_training.training_run import train
from support.peers import check_as_exact, check_greedy, logits, with_adapters
from support.quantised import LAYOUTS, quantise
from support.serving import Feeder, Stream, put

Prompt = Callable[[int, int], list[int]]
Quantised = Callable[[str], tuple[Path, Path]]


@pytest.fixture(scope="module")
def quantised(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Quantised:
    """By layout: the folder of a tiny Llama in it, and of the same weights as plain numbers."""

    def make(layout: str) -> tuple[Path, Path]:
        return quantise(tiny_model("llama"), tmp_path_factory.mktemp("coded") / layout, layout)

    return cache(make)


def plain_model(folder: Path, dtype: torch.dtype) -> AutoModelForCausalLM:
    with quiet_loading():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_weight_is_the_very_one(layout: str, quantised: Quantised) -> None:
    folder, plain = quantised(layout)
    base = load_base(BaseSpec(str(folder), device="cpu"))
    expected = load_file(plain / "model.safetensors")
    weights = ModelWeights(base.model)
    coded = [name for name, module in base.model.named_modules() if isinstance(module, CodedLinear)]
    assert len(coded) == 3 * 7
    for name in coded:
        if layout == "gptq-8-bits-asymmetric":  # code * scale + offset, rounded once more
            wanted = expected[f"{name}.weight"].float()
            torch.testing.assert_close(weights.weight(name), wanted, rtol=1e-6, atol=1e-6)
        else:
            assert torch.equal(weights.weight(name), expected[f"{name}.weight"]), name
    assert LAYOUTS[layout]["quant_method"].split("-")[0].upper() in base.held.upper()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_adapters_in_one_batch_as_peft_on_these_weights(
    layout: str, quantised: Quantised, tiny_lora: Callable[..., Path], prompt: Prompt
) -> None:
    folder, plain = quantised(layout)
    adapters = [tiny_lora("llama", rank=8, seed=1), tiny_lora("llama", rank=3, seed=2, use_rslora=True)]
    model = ServedModel.load(BaseSpec(str(folder), device="cpu"), slots=4, blocks=256)
    assert (model._fused is None) == (layout == "gptq-act-order")
    slots: dict[Path | None, int] = {None: 0} | {adapter: put(model, adapter) for adapter in adapters}
    peer, exact = (with_adapters(plain_model(plain, kind), adapters) for kind in (torch.bfloat16, torch.float32))
    prompts = [prompt(70 - 9 * index, index) for index in range(len(slots))]
    streams = [Stream(list(tokens), slot) for tokens, slot in zip(prompts, slots.values(), strict=True)]
    found = Feeder(model).logits(streams, (17, 1, 40))
    for tokens, adapter, ours in zip(prompts, slots, found, strict=True):
        check_as_exact(ours, logits(peer, tokens, adapter), logits(exact, tokens, adapter))
    prompts = [prompt(70 - 20 * index, 10 + index) for index in range(len(slots))]
    streams = [Stream(list(tokens), slot) for tokens, slot in zip(prompts, slots.values(), strict=True)]
    written = Feeder(model).greedy(streams, 12)
    compared = sum(
        check_greedy(exact, tokens, ours, adapter)
        for tokens, ours, adapter in zip(prompts, written, slots, strict=True)
    )
    assert compared >= 12, "they part too early to compare much"


@pytest.mark.parametrize("method", ["qlora", "lora", "dora", "prompt-tuning"])
def test_training_on_it_and_serving_what_comes_out(method: str, quantised: Quantised, tmp_path: Path) -> None:
    folder, _ = quantised("awq")
    data = tmp_path / "data.jsonl"
    rows = [{"prompt": f"{index} cat =", "completion": f" {index % 3}"} for index in range(60)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = TrainConfig(
        data=data, output=tmp_path / "out", model=str(folder), method=method, rank=4 if "ra" in method else None,
        max_steps=12, batch_tokens=128, metric_examples=4, learning_rate=0.01, device="cpu",
    )  # fmt: skip
    result = train(config)
    assert result.after.loss < result.before.loss
    assert result.notes["base"]["quantization"] == "AWQ in 4 bits, groups of 64"
    model = ServedModel.load(BaseSpec(str(folder), device="cpu"), slots=2, blocks=32)
    assert put(model, config.output) == 1


def broken(folder: Path, target: Path, **changes: object) -> Path:
    """A copy with other settings of its quantisation."""
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    config = json.loads((target / "config.json").read_text())
    config["quantization_config"] |= changes
    (target / "config.json").write_text(json.dumps(config))
    return target


@pytest.mark.parametrize(
    ("layout", "changes", "message"),
    [
        ("gptq", {"bits": 3}, "gptq (3 bits), which is not read here"),
        ("awq", {"version": "gemv"}, "awq (version gemv), which is not read here"),
        ("gptq", {"quant_method": "aqlm"}, "aqlm (another method), which is not read here"),
        ("gptq", {"group_size": 128}, "q_proj cannot be read as GPTQ in 4 bits, groups of 128: 2 groups of 128"),
        ("compressed", {"format": "int-quantized", "config_groups": {}}, "format without groups"),
        (
            "compressed",
            {"config_groups": {"group_0": {"format": "marlin-24", "weights": {"num_bits": 4, "type": "int"}}}},
            "compressed-tensors (format marlin-24, int of 4 bits), which is not read here",
        ),
        ("gptq", {"quant_method": "bitsandbytes"}, "bitsandbytes (neither 4 nor 8 bits), which is not read here"),
    ],
)
def test_what_is_not_read_is_refused_by_name(
    layout: str, changes: dict[str, object], message: str, quantised: Quantised, tmp_path: Path
) -> None:
    folder = broken(quantised(layout)[0], tmp_path / "broken", **changes)
    with pytest.raises(BaseModelError) as caught:
        load_base(BaseSpec(str(folder), device="cpu"))
    assert message in str(caught.value)
    assert caught.value.field == "model"


def test_what_lacks_is_named(quantised: Quantised, tmp_path: Path) -> None:
    folder = broken(quantised("awq")[0], tmp_path / "broken")
    tensors = load_file(folder / "model.safetensors")
    kept = {name: value for name, value in tensors.items() if "1.mlp.up_proj" not in name}
    save_file(kept, folder / "model.safetensors")
    with pytest.raises(BaseModelError, match=r"no weights for model\.layers\.1\.mlp\.up_proj\.weight \(1 in all\)"):
        load_base(BaseSpec(str(folder), device="cpu"))
    kept = {name: value for name, value in tensors.items() if not name.endswith("up_proj.scales")}
    save_file(kept, folder / "model.safetensors")
    with pytest.raises(BaseModelError, match=r"up_proj cannot be read as AWQ in 4 bits, groups of 64: 'scales'"):
        load_base(BaseSpec(str(folder), device="cpu"))


def test_bitsandbytes_own_checkpoint_is_the_base_that_it_was_made_of(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    usual = load_base(BaseSpec(str(tiny_model("llama")), device="cpu"))
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    with quiet_loading():
        model = AutoModelForCausalLM.from_pretrained(
            tiny_model("llama"), quantization_config=settings, dtype=torch.bfloat16, device_map={"": "cpu"}
        )
        model.save_pretrained(tmp_path / "saved")
    usual.tokenizer.save_pretrained(tmp_path / "saved")
    saved = load_base(BaseSpec(str(tmp_path / "saved"), device="cpu"))
    assert (saved.held, saved.coded) == ("NF4 with double quantisation", True)
    mine, theirs = ModelWeights(saved.model), ModelWeights(usual.model)
    for site in usual.shape.sites:
        assert torch.equal(mine.weight(site), theirs.weight(site)), site
