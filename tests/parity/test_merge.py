"""Adapters merged into their base: the written model says what PEFT says, for every method whose change weights can
carry, on plain and on 4-bit bases; what they cannot is refused, and nothing is left."""

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from onebase import LLM, SamplingParams
from onebase.cli.main import main
from onebase_adapters.errors import AdapterError, ConfigError, OneBaseError
from onebase_engine.base.base_spec import BaseSpec
from onebase_engine.base.gguf_file import convert_gguf
from onebase_engine.base.load_base import quiet_loading
from onebase_engine.export.lowered_on_base import load_lowered
from onebase_engine.export.merge_checked import merge_checked
from onebase_engine.export.merged_model import write_merged
from onebase_engine.export.model_form import GgufForm, ModelForm
from support.methods import save_bottleneck, save_named
from support.peers import load_exact, logits, with_adapters
from support.quantised import quantise, save_gguf

Prompt = Callable[[int, int], list[int]]
METHODS = (
    *("rslora", "dora", "adalora", "ia3", "ia3-shared-input", "lora-embedding", "lora-saved-head"),
    *("trainable-tokens", "loha", "lokr", "vera", "oft", "hra"),
)


def merge(
    adapter: Path, output: Path, model: Path, *, least: float = 0.0, form: ModelForm = "transformers"
) -> float:
    prompts = [list(range(5, 45)), list(range(60, 90))]
    spec = BaseSpec(str(model), device="cpu")
    return merge_checked(adapter, output, spec, prompts, least=least, progress=lambda _: None, form=form)


def read_back(folder: Path) -> AutoModelForCausalLM:
    """In float32: what the file says, without the rounding of activations."""
    with quiet_loading():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def greedy(model: Path) -> tuple[int, ...]:
    with LLM(str(model), quantization="none", device="cpu", cache_gib=0.01) as llm:
        [made] = llm.generate(["the stop"], SamplingParams(max_tokens=16, temperature=0))
    return made.outputs[0].token_ids


def check_same(found: torch.Tensor, expected: torch.Tensor, base: torch.Tensor) -> None:
    """But for weights in bfloat16, which is far less than what the adapter does."""
    error = (found - expected).norm() / expected.norm()
    assert error < 0.02, f"{error:.4f}"
    assert (expected - base).norm() / expected.norm() > 4 * error, "the adapter does too little to tell"


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("method", METHODS)
def test_a_merged_model_says_what_peft_says(
    method: str, tiny_model: Callable[[str], Path], tmp_path: Path, prompt: Prompt
) -> None:
    base, adapter = tiny_model("llama"), save_named(tmp_path / "adapter", tiny_model("llama"), method)
    agreed = merge(adapter, tmp_path / "merged", base)
    exact, tokens = with_adapters(load_exact(base), [adapter]), prompt(70, 1)
    found, expected = logits(read_back(tmp_path / "merged"), tokens), logits(exact, tokens, adapter)
    check_same(found, expected, logits(exact, tokens))
    assert agreed > 0.8
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template


@pytest.mark.parametrize("family", ["qwen2", "gemma3", "phi3", "gpt2"])
def test_other_families(
    family: str, tiny_model: Callable[[str], Path], tiny_lora: Callable[..., Path], tmp_path: Path, prompt: Prompt
) -> None:
    base, adapter = tiny_model(family), tiny_lora(family, rank=4, seed=1)
    merge(adapter, tmp_path / "merged", base)
    exact, tokens = with_adapters(load_exact(base), [adapter]), prompt(70, 1)
    check_same(
        logits(read_back(tmp_path / "merged"), tokens), logits(exact, tokens, adapter), logits(exact, tokens)
    )


def test_on_a_4_bit_checkpoint(
    tiny_model: Callable[[str], Path], tiny_lora: Callable[..., Path], tmp_path: Path, prompt: Prompt
) -> None:
    coded, plain = quantise(tiny_model("llama"), tmp_path / "awq", "awq")
    adapter = tiny_lora("llama", rank=4, seed=1)
    merge(adapter, tmp_path / "merged", coded)
    exact, tokens = with_adapters(read_back(plain), [adapter]), prompt(70, 1)
    check_same(
        logits(read_back(tmp_path / "merged"), tokens), logits(exact, tokens, adapter), logits(exact, tokens)
    )


@pytest.mark.parametrize(
    ("family", "form", "kind"),
    [
        ("llama", "gguf-q8_0", "Q8_0"),
        ("qwen2", "gguf-f16", "F16"),
        ("phi3", "gguf", "BF16"),
    ],
)
def test_a_gguf_file_holds_the_merged_model(
    family: str,
    form: GgufForm,
    kind: str,
    tiny_model: Callable[[str], Path],
    tiny_lora: Callable[..., Path],
    tmp_path: Path,
) -> None:
    """Every tensor is as another writer has it, and the engine reads the file as the transformers model."""
    base, adapter, file = tiny_model(family), tiny_lora(family, rank=4, seed=1), tmp_path / "merged.gguf"
    agreed = merge(adapter, file, base, form=form)
    assert agreed > 0.8
    (tmp_path / "model").mkdir()
    spec = BaseSpec(str(base), device="cpu")
    write_merged(*load_lowered(adapter, spec, lambda _: None), tmp_path / "model")
    save_gguf(tmp_path / "model", tmp_path / "other.gguf", "F32")
    found, expected = (
        {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
        for path in (file, tmp_path / "other.gguf")
    )
    assert found.keys() == expected.keys()
    form_of_matrices = gguf.GGMLQuantizationType[kind]
    for name, tensor in found.items():
        exact = np.array(expected[name].data)
        matrix = exact.ndim == 2
        assert tensor.tensor_type == (form_of_matrices if matrix else gguf.GGMLQuantizationType.F32), name
        wanted = gguf.quantize(exact, form_of_matrices) if matrix else exact
        assert np.array_equal(np.array(tensor.data), wanted), name
    (tmp_path / "read").mkdir()
    convert_gguf(file, tmp_path / "read", lambda _: None)
    if form != "gguf-q8_0":
        assert greedy(tmp_path / "read") == greedy(tmp_path / "model")
    assert AutoTokenizer.from_pretrained(tmp_path / "read").chat_template
    assert "$ llama-server -m merged.gguf" in (tmp_path / "merged.gguf.md").read_text()
    assert not list(tmp_path.glob(".merged*")), "nothing half-made is left"


def test_what_gguf_cannot_hold_is_refused(
    tiny_model: Callable[[str], Path], tiny_lora: Callable[..., Path], tmp_path: Path
) -> None:
    adapter = tiny_lora("llama", rank=4, seed=1)
    with pytest.raises(ConfigError, match=r"let its name end in \.gguf"):
        merge(adapter, tmp_path / "merged", tiny_model("llama"), form="gguf")
    with pytest.raises(AdapterError, match="nothing is written"):
        merge(adapter, tmp_path / "merged.gguf", tiny_model("llama"), form="gguf", least=1.01)
    for family, reason in (
        ("gpt2", "Bases of the type gpt2 are not written as GGUF here: llama,"),
        ("mistral", "GGUF has no place for the model's sliding_window: it was 24, and is None"),
        ("gemma3", "GGUF has no place for the model's layer_types"),
    ):
        with pytest.raises(OneBaseError, match=reason):
            merge(tiny_lora(family, rank=4, seed=1), tmp_path / "merged.gguf", tiny_model(family), form="gguf")
    assert not list(tmp_path.glob("*merged*"))


def test_what_weights_cannot_carry_is_refused(
    tiny_model: Callable[[str], Path], tiny_lora: Callable[..., Path], tmp_path: Path
) -> None:
    base = tiny_model("llama")
    prompt = save_named(tmp_path / "prompt", base, "prompt-tuning")
    with pytest.raises(AdapterError, match=r"more than a change of weights \(VirtualTokens\)"):
        merge(prompt, tmp_path / "merged", base)
    layers = save_bottleneck(tmp_path / "layers", "pfeiffer", "gelu", 8)
    with pytest.raises(AdapterError, match=r"more than a change of weights \(Bottleneck\)"):
        merge(layers, tmp_path / "merged", base)
    biases = save_named(tmp_path / "biases", base, "lora-bias")
    with pytest.raises(AdapterError, match="a bias, for which LlamaForCausalLM has no place"):
        merge(biases, tmp_path / "merged", base)
    adapter = tiny_lora("llama", rank=4, seed=1)
    with pytest.raises(AdapterError, match="nothing is written"):
        merge(adapter, tmp_path / "merged", base, least=1.01)
    assert not (tmp_path / "merged").exists()
    (tmp_path / "merged").mkdir()
    with pytest.raises(ConfigError, match="Choose another output"):
        merge(adapter, tmp_path / "merged", base)
    assert not list(tmp_path.glob(".merged*")), "nothing half-made is left"


def test_the_command(
    tiny_model: Callable[[str], Path],
    tiny_lora: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "the stop string", "completion": " of this text"}\n' * 3)
    words = ["adapters", "merge", str(tiny_lora("llama", rank=4, seed=1)), "--model", str(tiny_model("llama"))]
    words += ["--output", str(tmp_path / "merged"), "--data", str(data), "--least-agreement", "0.5"]
    monkeypatch.setattr("sys.argv", ["onebase", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    told = capsys.readouterr().out
    assert "merging into the base as it is served: NF4" in told
    assert "of the served adapter's greedy tokens" in told
    assert (tmp_path / "merged" / "model.safetensors").is_file()
    card = (tmp_path / "merged" / "README.md").read_text()
    assert 'base_model_relation: "merge"' in card
    assert "are this model's best, too." in card
    assert "$ onebase serve --model merged" in card
