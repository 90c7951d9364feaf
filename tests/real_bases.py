"""The default base as the tools that people use quantise it: `make bases`. It takes some minutes, once; the tests
of `parity/test_real_bases.py` read what it leaves in the cache, and are skipped without it.

auto-round, which writes the layouts of GPTQ, AWQ, compressed-tensors and GGUF on a CPU, has an environment of its
own there: what it needs is nobody else's business.
"""

import os
import subprocess
import sys
import venv
from pathlib import Path

from onebase_engine.base.base_spec import DEFAULT_BASE
from onebase_engine.base.catalog import fetch_base
from onebase_engine.user_folders import cache_home

ROOT = Path(__file__).parents[1]
TEXT = "The capital of France is Paris. Water boils at one hundred degrees, and"
KINDS: dict[str, dict[str, object]] = {
    "gptq": {"format": "auto_gptq", "scheme": "W4A16", "group_size": 128},
    "gptq-asymmetric": {"format": "auto_gptq", "scheme": "W4A16", "group_size": 64, "sym": False},
    "awq": {"format": "auto_awq", "scheme": "W4A16", "group_size": 64, "sym": False},
    "compressed": {"format": "llm_compressor", "scheme": "W4A16", "group_size": 64},
    "gguf-q4_0": {"format": "gguf:q4_0", "scheme": "gguf:q4_0"},
    "gguf-q4_k_m": {"format": "gguf:q4_k_m", "scheme": "gguf:q4_k_m"},
}
_QUANTISE = """
import sys
from auto_round import AutoRound
source, target, settings = sys.argv[1], sys.argv[2], eval(sys.argv[3])
made = settings.pop("format")
texts = ["The quick brown fox jumps over the lazy dog. " * 20] * 8
AutoRound(source, iters=0, nsamples=4, seqlen=64, dataset=texts, disable_opt_rtn=True, device_map="cpu",
          **settings).quantize_and_save(target, format=made)
"""
_ASK = """
import sys, torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, text, target = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map="cpu")
ids = torch.tensor([AutoTokenizer.from_pretrained(folder)(text)["input_ids"]])
with torch.no_grad():
    save_file({"logits": model(ids).logits[0].float().contiguous()}, target)
"""


def made_bases() -> Path:
    """Where they are."""
    return cache_home() / "quantised"


def base_of(kind: str) -> Path:
    """A kind's folder, or its .gguf file; it need not exist."""
    found = [*made_bases().glob(f"{kind}/*/*.gguf"), *made_bases().glob(f"{kind}/*/config.json")]
    return next((path if path.suffix == ".gguf" else path.parent for path in found), made_bases() / kind)


def main() -> None:
    """Make those that are not there."""
    source = fetch_base(DEFAULT_BASE, progress=print)
    environment = made_bases() / "environment"
    python = str(environment / "bin" / "python")
    if not (environment / "done").exists():
        venv.create(environment, with_pip=True, clear=True)
        install = [python, "-m", "pip", "install", "-q"]
        subprocess.run([*install, "-c", ROOT / "constraints.txt", "torch"], check=True)
        subprocess.run([*install, "auto-round", "compressed-tensors", "gguf", "sentencepiece"], check=True)
        (environment / "done").touch()
    offline = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    for kind, settings in KINDS.items():
        if not base_of(kind).exists():
            print(f"{kind}: quantising", flush=True)
            subprocess.run(
                [python, "-c", _QUANTISE, source, made_bases() / kind, repr(settings)],
                check=True, env=offline, stdout=subprocess.DEVNULL, stderr=sys.stderr,
            )  # fmt: skip
    answers = made_bases() / "compressed.safetensors"
    if not answers.exists():
        print("compressed: asking the tool itself", flush=True)
        subprocess.run([python, "-c", _ASK, base_of("compressed"), TEXT, answers], check=True, env=offline)
    print(f"In {made_bases()}: {', '.join(KINDS)}")


if __name__ == "__main__":
    main()
