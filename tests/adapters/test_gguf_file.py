"""GGUF files as bases: every number of their 4-bit tensors kept, names and orders turned into transformers' own."""

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from onebase import LLM, SamplingParams
from onebase_adapters.errors import AdapterError, BaseModelError, ConfigError
from onebase_adapters.lowering.lower import load_adapter
from onebase_engine.base.base_spec import BaseSpec
from onebase_engine.base.gguf_file import _READERS
from onebase_engine.base.load_base import LoadedBase, load_base, load_full
from onebase_engine.base.model_weights import ModelWeights
from onebase_engine.export.gguf_adapter import write_gguf_adapter
from onebase_engine.export.merged_model import write_merged
from onebase_engine.kernels.coded_linear import CodedLinear
from support.methods import save_named
from support.quantised import save_gguf
from support.tokenizer import EOS, TEMPLATE


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ONEBASE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma3", "phi3"])
def test_every_weight_is_the_very_one(
    family: str, kind: str, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    expected = save_gguf(tiny_model(family), tmp_path / "model.gguf", kind)
    told: list[str] = []
    base = load_base(BaseSpec(str(tmp_path / "model.gguf"), device="cpu"), progress=told.append)
    weights, plain = ModelWeights(base.model), dict(base.model.named_parameters())
    coded = [name for name, module in base.model.named_modules() if isinstance(module, CodedLinear)]
    assert len(coded) == 3 * (4 if family == "phi3" else 7)
    for name, value in expected.items():
        module = name.removesuffix(".weight")
        if module in coded:
            assert torch.equal(weights.weight(module), value), name
        elif name != "lm_head.weight" or name in plain:
            assert torch.equal(plain[name], value.to(torch.bfloat16)), name
    assert base.held == f"GGUF {kind}"
    assert any(f"model.gguf: GGUF {kind}" in line for line in told)
    assert (base.tokenizer.eos_token_id, base.tokenizer.chat_template) == (EOS, TEMPLATE)


def test_it_is_made_once_and_again_for_another_file(
    tiny_model: Callable[[str], Path], tmp_path: Path, cache: Path
) -> None:
    file = tmp_path / "model.gguf"
    save_gguf(tiny_model("llama"), file, "Q4_0")
    told: list[str] = []
    for _ in range(2):
        load_base(BaseSpec(str(file), device="cpu"), progress=told.append)
    assert sum("model.gguf: GGUF" in line for line in told) == 1
    save_gguf(tiny_model("llama"), file, "Q4_1")
    assert load_base(BaseSpec(str(file), device="cpu")).held == "GGUF Q4_1"
    assert len(list((cache / "models").iterdir())) == 2


def test_what_is_not_in_codes_is_told(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    save_gguf(tiny_model("llama"), tmp_path / "model.gguf", "F16")
    base = load_base(BaseSpec(str(tmp_path / "model.gguf"), device="cpu"))
    assert base.held == "GGUF F16 as bfloat16"
    assert not any(isinstance(module, CodedLinear) for module in base.model.modules())


def test_it_answers_with_adapters(
    tiny_model: Callable[[str], Path], tiny_lora: Callable[..., Path], tmp_path: Path
) -> None:
    save_gguf(tiny_model("llama"), tmp_path / "model.gguf", "Q4_1")
    adapter = tiny_lora("llama", rank=4, seed=1)
    with LLM(tmp_path / "model.gguf", {"mine": adapter}, device="cpu", cache_gib=0.01) as llm:
        plain, adapted = llm.generate(
            ["the stop", "the stop"], SamplingParams(max_tokens=8, temperature=0), adapter=[None, "mine"]
        )
    assert plain.outputs[0].token_ids and plain.outputs[0].token_ids != adapted.outputs[0].token_ids


@pytest.mark.parametrize(
    ("kind", "size", "scales"), [("Q4_K", 144, (0, 4)), ("Q5_K", 176, (0, 4)), ("Q6_K", 210, (208, 210))]
)
def test_blocks_of_256_are_read_to_the_bit(kind: str, size: int, scales: tuple[int, int]) -> None:
    """gguf cannot write them, so of random bytes; the scales of scales are numbers."""
    random = np.random.default_rng(0)
    blocks = random.integers(0, 256, (4, 3, size), dtype=np.uint8)
    count = (scales[1] - scales[0]) // 2
    numbers = random.uniform(-1, 1, (4, 3, count)).astype(np.float16).view(np.uint8)
    blocks[..., slice(*scales)] = numbers
    data = blocks.reshape(4, -1)
    expected = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind])
    assert torch.equal(_READERS[kind](data).expanded(), torch.from_numpy(expected))


def test_bad_files_are_refused(tiny_model: Callable[[str], Path], tmp_path: Path, cache: Path) -> None:
    file = tmp_path / "model.gguf"
    save_gguf(tiny_model("llama"), file, "Q4_0")
    whole = file.read_bytes()
    for content, message in (
        (whole[: len(whole) // 2], "is no whole GGUF file"),
        (b"GGUF", "is no whole GGUF file"),
        (b"not at all", "is no whole GGUF file"),
    ):
        file.write_bytes(content)
        with pytest.raises(BaseModelError, match=message):
            load_base(BaseSpec(str(file), device="cpu"))
    with pytest.raises(BaseModelError, match="There is no file"):
        load_base(BaseSpec(str(tmp_path / "absent.gguf"), device="cpu"))
    writer = gguf.GGUFWriter(file, "rwkv7")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(BaseModelError, match="architecture 'rwkv7', whose tensors are not read here: llama"):
        load_base(BaseSpec(str(file), device="cpu"))
    for change, message in (
        ({"extra": "rope_freqs.weight"}, "holds rope_freqs.weight, which LlamaForCausalLM has no place for"),
        ({"setting": ("rope.scaling.type", "yarn")}, r"has llama.rope.scaling.type = yarn, which is not read here"),
        ({"setting": ("expert_count", 8)}, r"has llama.expert_count = 8, which is not read here"),
        ({"leave_out": "blk.1.ffn_up.weight"}, r"has no tensor for model.layers.1.mlp.up_proj.weight"),
    ):
        save_gguf(tiny_model("llama"), file, "Q4_0", **change)
        with pytest.raises(BaseModelError, match=message):
            load_base(BaseSpec(str(file), device="cpu"))
    assert not list((cache / "models").iterdir()), "nothing half-made is left"


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_an_adapter_exported_changes_a_file_as_it_changes_the_base(
    family: str, tiny_model: Callable[[str], Path], tiny_lora: Callable[..., Path], tmp_path: Path
) -> None:
    """What llama.cpp does: lora_b times lora_a is added to the tensor of the name."""
    folder, adapter = tiny_model(family), tiny_lora(family, rank=3, seed=2, use_rslora=True)
    base = load_base(BaseSpec(str(folder), device="cpu"))
    lowered = load_adapter(adapter, "x", base.shape, ModelWeights(base.model))
    assert write_gguf_adapter(base, lowered, tmp_path / "adapter.gguf") == 3 * 7
    reader = gguf.GGUFReader(tmp_path / "adapter.gguf")
    assert reader.fields["general.type"].contents() == "adapter"
    assert reader.fields["adapter.type"].contents() == "lora"
    assert reader.fields["adapter.lora.alpha"].contents() == 0
    parts = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    save_gguf(folder, tmp_path / "plain.gguf", "F32")
    plain = {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(tmp_path / "plain.gguf").tensors}
    changed = {}
    for name, value in plain.items():
        a, b = parts.get(f"{name}.lora_a"), parts.get(f"{name}.lora_b")
        changed[name] = value if a is None else value + b @ a
    merged = LoadedBase(load_full(folder), base.tokenizer, base.shape, base.device)
    write_merged(merged, lowered, tmp_path / "merged")
    save_gguf(tmp_path / "merged", tmp_path / "merged.gguf", "F32")
    for tensor in gguf.GGUFReader(tmp_path / "merged.gguf").tensors:
        found, expected = (torch.from_numpy(np.array(each)) for each in (tensor.data, changed[tensor.name]))
        torch.testing.assert_close(found, expected, rtol=2**-8, atol=1e-6, msg=tensor.name)  # it is in bfloat16
    with pytest.raises(ConfigError, match="Choose another output"):
        write_gguf_adapter(base, lowered, tmp_path / "adapter.gguf")


def test_what_llama_cpp_has_no_place_for(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    base = load_base(BaseSpec(str(tiny_model("llama")), device="cpu"))
    for method, named in (("ia3", "Rescale"), ("prompt-tuning", "VirtualTokens"), ("lora-embedding", "embedding")):
        folder = save_named(tmp_path / method, tiny_model("llama"), method)
        lowered = load_adapter(folder, "x", base.shape, ModelWeights(base.model))
        with pytest.raises(AdapterError, match=f"no place for this adapter's .*{named}"):
            write_gguf_adapter(base, lowered, tmp_path / "adapter.gguf")
    assert not list(tmp_path.glob("*.gguf"))
