"""The default base as auto-round, compressed-tensors and GGUF's tools have it: every number that they mean, and how
well each form of it predicts a page of text."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GgufConfig

from onebase_engine.base.base_spec import DEFAULT_BASE, BaseSpec
from onebase_engine.base.catalog import AS_IT_IS
from onebase_engine.base.load_base import LoadedBase, load_base, quiet_loading
from onebase_engine.kernels.coded_linear import CodedLinear
from onebase_engine.runner.batched_model import ServedModel
from real_bases import KINDS, TEXT, base_of, made_bases
from support.serving import Feeder, Stream

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(not all(base_of(kind).exists() for kind in KINDS), reason="`make bases` makes them"),
]
PAGE = Path(__file__).parents[2] / "LICENSE"


def loaded(kind: str) -> LoadedBase:
    return load_base(BaseSpec(str(base_of(kind)), device="cpu"))


def weights(base: LoadedBase) -> dict[str, torch.Tensor]:
    return {
        name: module.coded.expanded()
        for name, module in base.model.named_modules()
        if isinstance(module, CodedLinear)
    }


def test_gptq_and_awq_hold_the_same_numbers_of_the_same_rounding() -> None:
    """Both were rounded to the nearest in groups of 64: two layouts, read by two functions, and one result."""
    one, other = weights(loaded("gptq-asymmetric")), weights(loaded("awq"))
    assert len(one) == 210 and one.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_compressed_tensors_own_logits() -> None:
    base = loaded("compressed")
    for module in base.model.modules():
        if isinstance(module, CodedLinear):
            module.pack = None  # in float32, as the tool was asked
    ids = torch.tensor([base.tokenizer(TEXT)["input_ids"]])
    with torch.inference_mode():
        found = base.model.float()(ids).logits[0]
    expected = load_file(made_bases() / "compressed.safetensors")["logits"]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("kind", ["gguf-q4_0", "gguf-q4_k_m"])
def test_transformers_own_reading_of_gguf(kind: str) -> None:
    file = base_of(kind)
    base = loaded(kind)
    with quiet_loading():
        theirs = AutoModelForCausalLM.from_pretrained(
            str(file.parent),
            gguf_file=file.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32,
        )
    mine = weights(base)
    assert len(mine) == 210
    parameters = dict(base.model.named_parameters())
    for name, value in theirs.named_parameters():
        module = name.removesuffix(".weight")
        if module in mine:
            assert torch.equal(mine[module], value), name
        else:
            assert torch.equal(parameters[name], value.to(torch.bfloat16)), name


def test_each_form_predicts_a_page_nearly_as_well() -> None:
    """Perplexity by the served model; rounding to the nearest costs a small model some, and no reading error would
    stay within these bounds."""
    found = {}
    for kind, spec in {
        "bfloat16": BaseSpec(DEFAULT_BASE, "none", device="cpu"),
        "nf4": BaseSpec(DEFAULT_BASE, device="cpu"),
        "q4_1": BaseSpec(AS_IT_IS, device="cpu"),
        **{kind: BaseSpec(str(base_of(kind)), device="cpu") for kind in KINDS},
    }.items():
        model = ServedModel.load(spec, slots=1, blocks=64)
        ids = model.base.tokenizer(PAGE.read_text())["input_ids"][:900]
        (logits,) = Feeder(model).logits([Stream(list(ids))], (450,))
        losses = torch.nn.functional.cross_entropy(logits[:-1].float(), torch.tensor(ids[1:]))
        found[kind] = math.exp(float(losses))
    assert found["q4_1"] == pytest.approx(found["bfloat16"], rel=0.01), (
        "the package's own weights, not rounded again"
    )
    print({kind: round(value, 3) for kind, value in found.items()})
    assert found["bfloat16"] < 30
    for kind, value in found.items():
        assert value < 1.5 * found["bfloat16"], (kind, found)
