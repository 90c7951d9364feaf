"""Adapters of any method as PEFT's own: plain PEFT loads what was written, and says what the adapter's own method
says; what PEFT has no form for is refused, and nothing is left."""

import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from onebase.cli.main import main
from onebase_adapters.errors import AdapterError
from onebase_adapters.lowering.lower import load_adapter
from onebase_engine.base.base_spec import BaseSpec
from onebase_engine.base.load_base import LoadedBase, load_base
from onebase_engine.base.model_weights import ModelWeights
from onebase_engine.export.peft_adapter import export_peft, write_peft
from support.methods import CONFIGS, save_bottleneck, save_named
from support.peers import load_exact, logits, with_adapters

Prompt = Callable[[int, int], list[int]]
METHODS = {
    **dict.fromkeys(("rslora", "dora", "loha", "hra", "lora-bias", "beft"), "LORA"),
    **dict.fromkeys(("lora-embedding", "lora-saved-head", "trainable-tokens"), "LORA"),
    "ia3": "IA3",
    "cpt": "PROMPT_TUNING",
    "prefix-tuning": "PREFIX_TUNING",
}


@pytest.fixture(scope="module")
def base(tiny_model: Callable[[str], Path]) -> LoadedBase:
    return load_base(BaseSpec(str(tiny_model("llama")), device="cpu"))


@pytest.fixture(scope="module")
def exact(tiny_model: Callable[[str], Path]) -> Callable[[], torch.nn.Module]:
    loaded = load_exact(tiny_model("llama"))
    return lambda: deepcopy(loaded)


def write(folder: Path, base: LoadedBase, target: Path) -> Path:
    target.mkdir()
    write_peft(base, load_adapter(folder, "x", base.shape, ModelWeights(base.model)), target)
    return target


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.filterwarnings("ignore:.*lora_bias=True", "ignore:.*no bias term")
@pytest.mark.parametrize("method", [name for name in METHODS if name in CONFIGS])
def test_peft_says_the_same(
    method: str, base: LoadedBase, exact: Callable[[], torch.nn.Module], tmp_path: Path, prompt: Prompt
) -> None:
    adapter = save_named(tmp_path / "adapter", Path(base.shape.name), method)
    written = write(adapter, base, tmp_path / "written")
    config = json.loads((written / "adapter_config.json").read_text())
    assert config["peft_type"] == METHODS[method]
    tokens = prompt(70, 1)
    expected = logits(with_adapters(exact(), [adapter]), tokens, adapter)[-len(tokens) :]
    found = logits(with_adapters(exact(), [written]), tokens, written)[-len(tokens) :]
    plain = logits(exact(), tokens)
    error = (found - expected).norm() / expected.norm()
    assert error < 5e-3, f"{error:.5f}"
    assert (expected - plain).norm() / expected.norm() > 0.05, "the adapter does too little to tell"


@pytest.mark.parametrize("method", ["poly", "prompt-tuning"])
def test_what_is_written_is_what_is_served(method: str, tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    adapter = save_named(tmp_path / "adapter", tiny_model("llama"), method)
    spec, prompts = BaseSpec(str(tiny_model("llama")), device="cpu"), [list(range(5, 45)), list(range(60, 90))]
    agreed = export_peft(adapter, tmp_path / "out", spec, prompts, least=0.8, progress=lambda _: None)
    assert agreed >= 0.8
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    with pytest.raises(AdapterError, match="nothing is written"):
        export_peft(adapter, tmp_path / "more", spec, prompts, least=1.01, progress=lambda _: None)
    assert not list(tmp_path.glob("*more*")), "nothing half-made is left"


def test_what_peft_has_no_form_for(base: LoadedBase, tmp_path: Path) -> None:
    layers = save_bottleneck(tmp_path / "layers", "pfeiffer", "gelu", 8)
    with pytest.raises(AdapterError, match="it is layers of its own behind the base's blocks"):
        write(layers, base, tmp_path / "1")
    template = tmp_path / "template"
    template.mkdir()
    save_file({}, template / "adapter_model.safetensors")
    (template / "adapter_config.json").write_text(json.dumps({"peft_type": "TEMPLATE", "before": "Hello "}))
    with pytest.raises(AdapterError, match="send that text with each prompt instead"):
        write(template, base, tmp_path / "2")
    placed = save_named(tmp_path / "placed", Path(base.shape.name), "prompt-tuning")
    (placed / "onebase.json").write_text(json.dumps({"places": [0, 0, 0, 1, 1, 2, -1]}))
    with pytest.raises(AdapterError, match="its tokens stand among the prompt's"):
        write(placed, base, tmp_path / "3")


def test_the_command(
    tiny_model: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    adapter = save_named(tmp_path / "adapter", tiny_model("llama"), "loha")
    data = {"train": "f00d", "examples": 9, "held_out_examples": 1, "format": "text"}
    notes = {"method": "loha", "data": data, "metrics": {"before": {"loss": 3.0}, "after": {"loss": 1.5}}}
    (adapter / "onebase.json").write_text(json.dumps({**notes, "settings": {"rank": 4}}))
    words = ["adapters", "export", str(adapter), "--to", "peft", "--model", str(tiny_model("llama"))]
    monkeypatch.setattr("sys.argv", ["onebase", *words, "--output", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as ended:
        main()
    told = capsys.readouterr().out
    assert ended.value.code == 0, told
    assert "LOHA as LowRank up to rank 16" in told
    assert "of the served adapter's greedy tokens" in told
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"]) == ("LORA", 16)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| loss | 3 | 1.5 |" in card
    assert "SHA-256 of the data: f00d." in card
    assert json.loads((tmp_path / "out" / "onebase.json").read_text()) == notes


def test_an_encoder_decoders_adapter_is_refused_by_name(
    tiny_model: Callable[[str], Path], tiny_lora: Callable[..., Path], tmp_path: Path
) -> None:
    spec, adapter = BaseSpec(str(tiny_model("t5")), device="cpu"), tiny_lora("t5", modules=["q", "v"])
    with pytest.raises(AdapterError, match="encoder-decoder"):
        export_peft(adapter, tmp_path / "out", spec, [[5, 6, 7]], least=0.0, progress=lambda _: None)
    assert not (tmp_path / "out").exists()
