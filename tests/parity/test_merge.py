"""Adapters merged into their base: the written model says what PEFT says, for every method whose change weights can
carry, on plain and on 4-bit bases; what they cannot is refused, and nothing is left."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from onebase.cli.main import main
from onebase_adapters.errors import AdapterError, ConfigError
from onebase_engine.base.base_spec import BaseSpec
from onebase_engine.base.load_base import quiet_loading
from onebase_engine.export.merge_checked import merge_checked
from support.methods import save_bottleneck, save_named
from support.peers import load_exact, logits, with_adapters
from support.quantised import quantise

Prompt = Callable[[int, int], list[int]]
METHODS = (
    *("rslora", "dora", "adalora", "ia3", "ia3-shared-input", "lora-embedding", "lora-saved-head"),
    *("trainable-tokens", "loha", "lokr", "vera", "oft", "hra"),
)


def merge(adapter: Path, output: Path, model: Path, **options: float) -> float:
    prompts = [list(range(5, 45)), list(range(60, 90))]
    spec = BaseSpec(str(model), device="cpu")
    return merge_checked(adapter, output, spec, prompts, least=options.get("least", 0.0), progress=lambda _: None)


def read_back(folder: Path) -> AutoModelForCausalLM:
    """In float32: what the file says, without the rounding of activations."""
    with quiet_loading():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


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
