"""Mixtures of experts: adapters in each form that PEFT has for experts, merging, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from onebase_adapters.errors import AdapterFormatError, AdapterMismatchError, BaseModelError
from onebase_adapters.lowering.lower import load_adapter
from onebase_engine.base.base_spec import BaseSpec
from onebase_engine.base.load_base import load_base, load_full, quiet_loading
from onebase_engine.base.mixture import Experts, is_mixture
from onebase_engine.base.model_weights import ModelWeights
from onebase_engine.export.merge_checked import merge_checked
from onebase_engine.kernels.bitsandbytes_import import Linear4bit
from onebase_engine.runner.batched_model import ServedModel
from support.models import MIXTURES, targets
from support.peers import load_exact, logits, with_adapters
from support.serving import Feeder, Stream, put

Prompt = Callable[[int, int], list[int]]
OLD = {"mixtral": ("block_sparse_moe", "w1", "w3", "w2"), "qwen3_moe": ("mlp", "gate_proj", "up_proj", "down_proj")}
"""transformers 4's names of the block and of an expert's modules."""


def save_old(folder: Path, model: Path, family: str, rank: int = 4) -> Path:
    """A LoRA as PEFT saved it when each expert was a module of three, with one on the router."""
    config = AutoConfig.from_pretrained(model)
    block, gate, up, down = OLD[family]
    inner = config.moe_intermediate_size if family == "qwen3_moe" else config.intermediate_size
    dense = getattr(config, "mlp_only_layers", [])
    generator = torch.Generator().manual_seed(5)
    tensors: dict[str, torch.Tensor] = {}

    def add(name: str, inputs: int, outputs: int) -> None:
        for part, shape in (("A", (rank, inputs)), ("B", (outputs, rank))):
            noise = torch.randn(shape, generator=generator) * (1 if part == "A" else 0.3) / shape[1] ** 0.5
            tensors[f"base_model.model.{name}.lora_{part}.weight"] = noise.bfloat16().float()

    for layer in (layer for layer in range(config.num_hidden_layers) if layer not in dense):
        path = f"model.layers.{layer}.{block}"
        add(f"{path}.gate", config.hidden_size, config.num_local_experts)
        for expert in range(config.num_local_experts):
            for name in (gate, up):
                add(f"{path}.experts.{expert}.{name}", config.hidden_size, inner)
            add(f"{path}.experts.{expert}.{down}", inner, config.hidden_size)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 8, "inference_mode": True}
    settings |= {
        "target_modules": ["gate", gate, up, down],
    }
    if family == "qwen3_moe":  # whose module and parameter have one name: PEFT forgets other patterns
        settings["alpha_pattern"] = {down: 12}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def typical_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Of most tokens: rounding sends some to another expert."""
    return float(((found.float() - expected).norm(dim=-1) / expected.norm(dim=-1)).median())


@pytest.mark.parametrize("family", MIXTURES)
def test_experts_are_held_in_4_bits(family: str, tiny_model: Callable[[str], Path]) -> None:
    base = load_base(BaseSpec(str(tiny_model(family)), device="cpu"))
    experts = [module for module in base.model.modules() if isinstance(module, Experts)]
    assert len(experts) == (3 if family == "mixtral" else 2)
    for each in experts:
        assert all(
            isinstance(one.gate_up_proj, Linear4bit) and isinstance(one.down_proj, Linear4bit) for one in each
        )


@pytest.mark.parametrize("family", MIXTURES)
def test_modules_of_single_experts_are_served_as_peft_reads_them(
    family: str, tiny_model: Callable[[str], Path], tmp_path: Path, prompt: Prompt
) -> None:
    folder, tokens = tiny_model(family), prompt(70, 4)
    adapter = save_old(tmp_path / "old", folder, family)
    model = ServedModel.load(BaseSpec(str(folder), device="cpu"), slots=1, blocks=64)
    (ours,) = Feeder(model).logits([Stream(tokens, put(model, adapter))])
    exact = with_adapters(load_exact(folder), [adapter])
    wanted, base = logits(exact, tokens, adapter), logits(exact, tokens)
    assert typical_error(ours, wanted) < 0.03
    assert typical_error(base, wanted) > 0.2


@pytest.mark.parametrize("family", MIXTURES)
def test_a_merged_mixture_says_what_peft_says(
    family: str, tiny_model: Callable[[str], Path], tiny_lora: Callable[..., Path], tmp_path: Path, prompt: Prompt
) -> None:
    folder, tokens = tiny_model(family), prompt(70, 4)
    adapter = tiny_lora(family, modules=list(targets(family)))
    spec, prompts = BaseSpec(str(folder), device="cpu"), [list(range(5, 45)), list(range(60, 90))]
    agreed = merge_checked(adapter, tmp_path / "merged", spec, prompts, least=0.0, progress=lambda _: None)
    assert agreed > 0.8
    with quiet_loading():
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    exact = with_adapters(load_exact(folder), [adapter])
    wanted = logits(exact, tokens, adapter)
    assert typical_error(logits(merged, tokens), wanted) < 0.02
    assert typical_error(logits(exact, tokens), wanted) > 0.2


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({".experts.lora_A.weight": (5, 128)}, AdapterMismatchError, "no ranks of 4 experts"),
        ({".experts.lora_A.weight": (16, 96)}, AdapterMismatchError, "this base's experts 64 -> 256 or 128 -> 64"),
        ({".experts.lora_B.weight": None}, AdapterFormatError, "has no lora_B"),
        ({".experts.9.w1.lora_A.weight": (4, 64), ".experts.9.w1.lora_B.weight": (128, 4)}, AdapterMismatchError,
         "no expert"),
        ({".experts.1.w1.lora_A.weight": (4, 64), ".experts.1.w1.lora_B.weight": (99, 4)}, AdapterMismatchError,
         "maps 64 -> 99, this base's expert 64 -> 128"),
        ({".experts.1.w2.lora_magnitude_vector": (64,)}, AdapterFormatError, "A and B are served"),
        ({".experts.1.w2.lora_A.weight": (4, 128), ".experts.1.w2.lora_B.weight": (64, 4)}, AdapterFormatError,
         "two updates"),
    ],
)  # fmt: skip
def test_an_adapter_that_does_not_fit_is_refused(
    change: dict[str, tuple[int, ...] | None], error: type[Exception], words: str,
    tiny_model: Callable[[str], Path], tiny_lora: Callable[..., Path], tmp_path: Path,
) -> None:  # fmt: skip
    adapter = tiny_lora("mixtral", rank=4, modules=["w1", "w2", "w3"])
    tensors = load_file(adapter / "adapter_model.safetensors")
    for end, shape in change.items():
        name = f"base_model.model.model.layers.1.mlp{end}"
        tensors.pop(name, None)
        if shape is not None:
            tensors[name] = torch.ones(shape)
            if shape == (5, 128):
                tensors[name.replace("lora_A", "lora_B")] = torch.ones(64, 5)
    save_file(tensors, adapter / "adapter_model.safetensors")
    base = load_base(BaseSpec(str(tiny_model("mixtral")), device="cpu"))
    with pytest.raises(error, match=words):
        load_adapter(adapter, "refused", base.shape, ModelWeights(base.model))


def test_an_adapter_of_experts_on_a_dense_base_is_refused(
    tiny_model: Callable[[str], Path], tiny_lora: Callable[..., Path]
) -> None:
    base = load_base(BaseSpec(str(tiny_model("llama")), device="cpu"))
    adapter = tiny_lora("mixtral", rank=4, modules=["w1", "w2", "w3"])
    with pytest.raises(AdapterMismatchError, match=r"no linear site 'model\.layers\.0\.mlp\.experts"):
        load_adapter(adapter, "refused", base.shape, ModelWeights(base.model))


def test_no_adapter_is_made_of_a_mixtures_fine_tune(tiny_model: Callable[[str], Path]) -> None:
    with pytest.raises(BaseModelError, match="serve its fine-tune as a base"):
        load_full(tiny_model("mixtral"))


def test_dense_models_are_none() -> None:
    assert not any(
        is_mixture(AutoConfig.for_model(kind)) for kind in ("llama", "qwen3", "gemma3_text", "t5", "bert")
    )


def test_experts_of_another_size_than_the_configuration_are_refused(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = tmp_path / "wrong"
    folder.mkdir()
    for file in tiny_model("mixtral").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 96}))
    with pytest.raises(BaseModelError, match="Cannot load"):
        load_base(BaseSpec(str(folder), device="cpu"))
