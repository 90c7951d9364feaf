"""The oracles: transformers and PEFT on the same 4-bit base, and the same arithmetic in float32.

`exact` uses the very weights that the 4-bit product uses, read back through it. Two bfloat16 computations of one
thing differ from each other; how far each is from the exact result says whether one of them is worse.
"""

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D

from onebase_engine.base.base_spec import BaseSpec
from onebase_engine.base.load_base import load_base, quiet_loading
from onebase_engine.base.mixture import Experts, Mixture
from onebase_engine.base.model_weights import ModelWeights

DEVICE = os.environ.get("ONEBASE_TEST_DEVICE", "cpu")
"""Where the served model is, in the tests of methods; `benchmarks.gpu` sets it."""

_NF4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
_ROUNDING = 0.06
"""The share of the logits' spread that two bfloat16 computations may differ by."""


def load_plain(folder: Path, device: str = "cpu") -> Any:
    """The model as transformers alone runs it, in NF4; a mixture's experts as plain matrices of the same values."""
    ours = load_base(BaseSpec(str(folder), device=device), attention="eager").model
    if not any(isinstance(module, Mixture) for module in ours.modules()):
        return ours
    with quiet_loading():
        theirs = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16, attn_implementation="eager", quantization_config=_NF4
        )
    _give_experts(theirs, ours)
    return theirs.eval()


def _give_experts(theirs: Any, ours: Any) -> None:
    """Let transformers' own model have the values of our experts."""
    weights = ModelWeights(ours)
    for name, module in ours.named_modules():
        if isinstance(module, Experts):
            held = theirs.get_submodule(name)
            for matrix in ("gate_up_proj", "down_proj"):
                values = torch.stack([weights.weight(f"{name}.{e}.{matrix}") for e in range(len(module))])
                getattr(held, matrix).data.copy_(values)


def load_exact(folder: Path) -> Any:
    """The model in float32, on the CPU, on the weights of its NF4 form."""
    with quiet_loading():
        exact = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    ours = load_base(BaseSpec(str(folder), device=DEVICE), attention="eager").model
    _give_experts(exact, ours)
    for name, module in ours.named_modules():
        if isinstance(module, Linear4bit) and ".experts." not in name:
            module.bias = None
            with torch.no_grad():
                one = torch.eye(module.in_features, dtype=torch.bfloat16, device=DEVICE)
                weight = module(one).float().cpu()  # [in, out]
            target = exact.get_submodule(name)
            target.weight = torch.nn.Parameter(weight if isinstance(target, Conv1D) else weight.t().contiguous())
    return exact.eval()


def with_adapters(model: Any, folders: Sequence[Path]) -> Any:
    """`model` as PEFT wraps it, each adapter under its folder's whole path."""
    with warnings.catch_warnings():
        # PEFT sets fan_in_fan_out itself where a quantised Conv1D has become a linear module, and says so.
        warnings.filterwarnings("ignore", ".*fan_in_fan_out.*")
        peft = PeftModel.from_pretrained(model, folders[0], adapter_name=str(folders[0]))
        for folder in folders[1:]:
            peft.load_adapter(folder, adapter_name=str(folder))
    return peft.eval()


@torch.inference_mode()
def logits(model: Any, tokens: Sequence[int], adapter: Path | None = None) -> torch.Tensor:
    """[tokens, vocab] float32. `adapter`: of a model `with_adapters`; None there is the base."""
    ids = torch.tensor([tokens])
    if not isinstance(model, PeftModel):
        found = model(ids).logits
    elif adapter is None:
        with model.disable_adapter():
            found = model(ids).logits
    else:
        model.set_adapter(str(adapter))
        found = model(ids).logits
    return found[0].float()


def check_as_exact(ours: torch.Tensor, peers: torch.Tensor, exact: torch.Tensor, *, ties: bool = False) -> None:
    """Ours may be no further from the exact logits than the peer's, but for chance. All [tokens, vocab]. `ties`: in
    a mixture of experts, rounding sends some tokens to another expert, here or there: one in ten is left out."""
    size = exact.norm(dim=-1)
    errors = (ours.float() - exact).norm(dim=-1) / size
    allowed = (peers - exact).norm(dim=-1) / size
    assert errors.mean() <= 1.2 * allowed.mean(), f"{errors.mean():.4f} against {allowed.mean():.4f}"
    # What rounding does to one token more than to others, it does to both.
    beside = errors / (allowed + allowed.mean())
    worst = beside.quantile(0.9) if ties else beside.max()
    assert worst <= 2.5, f"{worst:.2f} times the peer's"


def check_greedy(model: Any, prompt: Sequence[int], ours: list[int], adapter: Path | None) -> int:
    """Our greedy tokens may part from those of generate() only where two are within rounding of each other.
    Returns how many are the same before that."""
    scores = logits(model, [*prompt, *ours], adapter)[len(prompt) - 1 : -1]
    short = scores.max(-1).values - scores.gather(1, torch.tensor(ours)[:, None])[:, 0]
    worst = (short / scores.std(-1)).max()
    assert worst <= _ROUNDING, f"one of ours is {worst:.4f} deviations below the best after those before it"
    theirs = _generate(model, prompt, len(ours), adapter)
    parted = next((place for place, pair in enumerate(zip(ours, theirs, strict=True)) if len(set(pair)) > 1), None)
    if parted is None:
        return len(ours)
    best = scores[parted].topk(2).values
    assert best[0] - best[1] <= _ROUNDING * scores[parted].std(), "they part where one is clearly the best"
    return parted


@torch.inference_mode()
def _generate(model: Any, prompt: Sequence[int], new: int, adapter: Path | None) -> list[int]:
    ids = torch.tensor([prompt])
    options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 0}
    options |= {"max_new_tokens": new, "min_new_tokens": new}
    if not isinstance(model, PeftModel):
        out = model.generate(input_ids=ids, **options)
    elif adapter is None:
        with model.disable_adapter():
            out = model.generate(input_ids=ids, **options)
    else:
        model.set_adapter(str(adapter))
        out = model.generate(input_ids=ids, **options)
    tokens: list[int] = out[0, len(prompt) :].tolist()
    return tokens
