"""PEFT's options, one at a time, in float32: an adapter's primitives do to the base what PEFT does, to rounding.

What is served in bfloat16 hides a small mistake in its rounding; here there is none to hide in."""

import copy
import warnings
from collections.abc import Callable, Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from onebase_adapters.lowering.lower import load_adapter
from onebase_adapters.primitives.by_site import Parts
from onebase_adapters.primitives.lowered_adapter import LoweredAdapter
from onebase_engine.base.describe import describe_base
from onebase_engine.base.load_base import quiet_loading
from onebase_engine.base.model_weights import ModelWeights
from support.methods import of_this_peft, save_method

TASK: Any = {"task_type": "CAUSAL_LM"}
SITES = ["q_proj", "v_proj", "down_proj"]


def options(config: str, **settings: Any) -> Callable[[], peft.PeftConfig]:
    return lambda: getattr(peft, config)(**({"target_modules": SITES} | TASK | settings))


_BIASED: Mapping[str, Callable[[], peft.PeftConfig]] = {
    "dora": options("LoraConfig", r=4, use_dora=True),
    "lora-bias": options("LoraConfig", r=4, use_rslora=True, lora_bias=True),
    "lora-biases-of-its-own": options("LoraConfig", r=4, bias="lora_only"),
    "lora-of-some-layers": options("LoraConfig", r=4, layers_to_transform=[1]),
    "lora-patterns": options(
        "LoraConfig", r=4, rank_pattern={"^model.layers.1.self_attn.q_proj": 7},
        alpha_pattern={r"^.*layers\.2.*": 3},
    ),
    **({"lora-mica": options("LoraConfig", r=4, init_lora_weights="mica")} if version("peft") >= "0.20" else {}),
    "ia3": options("IA3Config", feedforward_modules=["down_proj"]),
    "loha": options("LoHaConfig", r=4, alpha=8),
    "lokr-full": options("LoKrConfig", r=64),
    "lokr-both": options("LoKrConfig", r=4, alpha=8, decompose_both=True, decompose_factor=8),
    "vera-by-seed": options("VeraConfig", r=8, save_projection=False, target_modules=["q_proj"]),
    "oft-shared": options("OFTConfig", oft_block_size=16, block_share=True),
    "oft-constrained": options("OFTConfig", oft_block_size=16, coft=True, eps=0.1),
    "hra-orthogonal": options("HRAConfig", r=4, apply_GS=True),
    "hra-biases-of-its-own": options("HRAConfig", r=4, bias="hra_only"),
    "vblora-top": options(
        "VBLoRAConfig", r=4, num_vectors=16, vector_length=16, topk=2, save_only_topk_weights=True
    ),
    "miss-mini": options("MissConfig", r=8, mini_r=4, init_weights="mini"),
    "randlora-by-seed": options("RandLoraConfig", r=8, save_projection=False),
    "gralora-hybrid": options("GraloraConfig", r=8, hybrid_r=2),
    "glora-vectors": options(
        "GloraConfig", r=4, config_A_B="vector", config_C="vector", config_D_E="vector"
    ),
    "tinylora-tied": options("TinyLoraConfig", u=8, weight_tying=1.0),
    "tinylora-by-seed": options("TinyLoraConfig", u=8, save_projection=False),
    "unilora-of-some-layers": options("UniLoraConfig", r=4, theta_d_length=64, layers_to_transform=[1, 2]),
    "unilora-indices": options("UniLoraConfig", r=4, theta_d_length=64, save_indices=True),
    "deft-parallel": options("DeftConfig", r=4, para=True),
    "peanut-deep": options("PeanutConfig", r=4, depth=2),
    "osf": options("OSFConfig"),
    "road": options("RoadConfig", variant="road_4", group_size=16),
    "beft": options("BeftConfig"),
}  # fmt: skip
BIASED = of_this_peft(_BIASED)
TIED: Mapping[str, Callable[[], peft.PeftConfig]] = {
    "lora-embedding": options("LoraConfig", r=4, target_modules=["embed_tokens"]),
    "lora-embedding-and-head": options(
        "LoraConfig", r=4, target_modules=["embed_tokens"], ensure_weight_tying=True
    ),
    "lora-head": options("LoraConfig", r=4, target_modules=["lm_head"]),
    "saved-embedding": options("LoraConfig", r=4, modules_to_save=["embed_tokens"]),
    "saved-embedding-and-head": options(
        "LoraConfig", r=4, modules_to_save=["embed_tokens"], ensure_weight_tying=True
    ),
    "tokens": options("LoraConfig", r=4, trainable_token_indices=[3, 9, 20]),
    "tokens-of-the-embedding": options("LoraConfig", r=4, trainable_token_indices={"embed_tokens": [3, 9, 20]}),
    "tokens-of-the-head": options("LoraConfig", r=4, trainable_token_indices={"lm_head": [3, 9, 20]}),
}


@pytest.fixture(scope="module")
def base(tiny_model: Callable[[str], Path]) -> Callable[[str], Any]:
    """A family's tiny model in float32."""

    def load(family: str) -> Any:
        with quiet_loading():
            return AutoModelForCausalLM.from_pretrained(tiny_model(family), dtype=torch.float32).eval()

    return cache(load)


def changed(base: Any, adapter: LoweredAdapter, embedding: str) -> Any:
    """A copy of `base` that computes what the primitives say."""
    model, parts = copy.deepcopy(base), Parts.of(adapter)
    if embedding in parts.low_rank:
        update, module = parts.low_rank[embedding], model.get_submodule(embedding)
        rows = module.weight + (update.scale * (update.b @ update.a)).t()
        module.weight = torch.nn.Parameter(rows, requires_grad=False)  # a tied head keeps what it had

    def change(site: str) -> Callable[..., torch.Tensor]:
        def after(module: Any, args: tuple[torch.Tensor], _: torch.Tensor) -> torch.Tensor:
            x = args[0] * parts.inputs.get(site, 1)
            y = torch.nn.functional.linear(x, module.weight, module.bias)
            if site in parts.low_rank:
                update = parts.low_rank[site]
                y = y + update.scale * (x @ update.a.t() @ update.b.t())
            return y * parts.outputs.get(site, 1) + parts.shifts.get(site, 0)

        return after

    for site in {*parts.low_rank, *parts.inputs, *parts.outputs, *parts.shifts} - {embedding}:
        model.get_submodule(site).register_forward_hook(change(site))
    return model


@pytest.mark.parametrize(
    ("family", "name"), [*(("qwen2", name) for name in BIASED), *(("llama", name) for name in TIED)]
)
@torch.no_grad()
def test_as_peft(
    family: str, name: str, base: Callable[[str], Any], tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    model = base(family)
    shape = describe_base(model, family, "")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = save_method(tmp_path, tiny_model(family), (BIASED | TIED)[name](), seed=3)
        peer = peft.PeftModel.from_pretrained(copy.deepcopy(model), folder).eval()
        adapter = load_adapter(folder, name, shape, ModelWeights(model))
    tokens = torch.arange(3, 48)[None]
    plain, wanted = model(tokens).logits, peer(tokens).logits
    found = changed(model, adapter, shape.embedding)(tokens).logits
    size = (wanted - plain).norm()
    assert size > 1e-3 * plain.norm(), "it changes nothing"
    assert (found - wanted).norm() <= 1e-4 * size
