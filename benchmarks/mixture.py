"""A random mixture of experts with a LoRA adapter for each stream, on experts and attention, beside PEFT on
transformers' own model with the same weights.

    python -m benchmarks.mixture [--streams 16] [--rounds 3] [--layers 8] [--hidden 512] [--experts 16]

PEFT refuses a batch of several adapters where they are on stacked experts. So its turns are one `generate()` after
another, an adapter each; and, for comparison, its mixed batch (`adapter_names`) with the same adapters' parts on
attention alone, which does less. Both in float32 and in bfloat16, the quicker of which counts. All take turns in
each round; ratios are taken within a round, their median counts. Prompts and outputs have 32 tokens; PEFT's time
for them is extrapolated from 5.
"""

import argparse
import json
import statistics
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3MoeConfig

from benchmarks.offline import add_adapters, generate, load_engine, random_prompt
from benchmarks.peers import generate_seconds
from onebase_engine.base.base_spec import DEFAULT_BASE
from onebase_engine.base.catalog import fetch_base
from onebase_engine.base.load_base import quiet_loading

PROMPT = OUTPUT = 32
SAMPLED = 5
RANK = 8
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def save_base(folder: Path, arguments: argparse.Namespace) -> Qwen3MoeConfig:
    """A Qwen3-MoE of random numbers, with the default base's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(fetch_base(DEFAULT_BASE))
    heads = arguments.hidden // 64
    config = Qwen3MoeConfig(
        vocab_size=-(-len(tokenizer) // 64) * 64, hidden_size=arguments.hidden, num_hidden_layers=arguments.layers,
        num_attention_heads=heads, num_key_value_heads=max(1, heads // 2), head_dim=64,
        moe_intermediate_size=arguments.hidden, num_experts=arguments.experts, num_experts_per_tok=4,
        max_position_embeddings=2048, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with quiet_loading():
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return config


def save_adapters(root: Path, config: Qwen3MoeConfig, count: int, *, experts: bool) -> list[Path]:
    """PEFT folders of random numbers on attention, and on all experts where asked."""
    hidden, inner, number = config.hidden_size, config.moe_intermediate_size, config.num_experts
    query, key = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    sizes = {f"self_attn.{name}": (hidden, key) for name in ("k_proj", "v_proj")}
    sizes |= {"self_attn.q_proj": (hidden, query), "self_attn.o_proj": (query, hidden)}
    if experts:
        sizes |= {"mlp.experts": (inner, hidden), "mlp.experts.base_layer": (hidden, 2 * inner)}
    folders = []
    for index in range(count):
        folder = root / f"{'experts' if experts else 'attention'}-{index:02d}"
        folder.mkdir()
        generator = torch.Generator().manual_seed(index)
        tensors = {}
        for layer in range(config.num_hidden_layers):
            for name, (inputs, outputs) in sizes.items():
                rank = RANK * (number if ".experts" in name else 1)
                path = f"base_model.model.model.layers.{layer}.{name}.lora_"
                tensors[path + "A.weight"] = torch.randn(rank, inputs, generator=generator) * 0.02
                tensors[path + "B.weight"] = torch.randn(outputs, rank, generator=generator) * 0.02
        save_file(tensors, folder / "adapter_model.safetensors")
        settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 16}
        settings |= {"target_modules": list(ATTENTION), "inference_mode": True}
        if experts:
            settings["target_parameters"] = ["experts.gate_up_proj", "experts.down_proj"]
        (folder / "adapter_config.json").write_text(json.dumps(settings))
        folders.append(folder)
    return folders


class Peer:
    """PEFT on transformers' model."""

    def __init__(self, base: Path, folders: Sequence[Path], prompts: torch.Tensor, dtype: torch.dtype) -> None:
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)
        with quiet_loading():
            model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
        self._names = [folder.name for folder in folders]
        self._model = PeftModel.from_pretrained(model, folders[0], adapter_name=self._names[0])
        for folder, name in zip(folders[1:], self._names[1:], strict=True):
            self._model.load_adapter(folder, adapter_name=name)
        self._model.eval()
        self._prompts = prompts

    def mixed(self) -> float:
        """Seconds of one batch of all adapters."""
        return _extrapolated(self._model, self._prompts, adapter_names=self._names)

    def in_turn(self) -> float:
        """Seconds of all streams, an adapter after another: of the first two, which do the same as the rest."""
        some = self._names[:2]
        seconds = 0.0
        for name, prompt in zip(some, self._prompts, strict=False):
            self._model.set_adapter(name)
            seconds += _extrapolated(self._model, prompt[None])
        return seconds * len(self._names) / len(some)


def _extrapolated(model: Any, prompts: torch.Tensor, **options: Any) -> float:
    first = generate_seconds(model, prompts, 1, **options)
    some = generate_seconds(model, prompts, SAMPLED, **options)
    return first + (some - first) / (SAMPLED - 1) * (OUTPUT - 1)


def main() -> None:
    """Print a table; exit with 1 if the bar is missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--experts", type=int, default=16)
    arguments = parser.parse_args()
    streams = arguments.streams
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        base = root / "base"
        config = save_base(base, arguments)
        on_experts, on_attention = (
            save_adapters(root, config, streams, experts=experts) for experts in (True, False)
        )
        engine = load_engine(str(base), cache_tokens=64 * streams + 1024)
        digests = add_adapters(engine, on_experts)
        prompts = torch.tensor([random_prompt(PROMPT, config.vocab_size, number) for number in range(streams)])
        runs: dict[str, Callable[[], float]] = {
            "onebase": lambda: generate(engine, digests, PROMPT, OUTPUT),
            "onebase, no adapters": lambda: generate(engine, [None] * streams, PROMPT, OUTPUT),
        }
        for dtype in (torch.float32, torch.bfloat16):
            name = str(dtype).removeprefix("torch.")
            runs[f"PEFT, one after another, {name}"] = Peer(base, on_experts, prompts[:2], dtype).in_turn
            runs[f"PEFT's batch, attention alone, {name}"] = Peer(base, on_attention, prompts, dtype).mixed
        generate(engine, digests, PROMPT, 2)
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for number in range(arguments.rounds):
            for name, run in runs.items():
                seconds[name].append(run())
            print(f"round {number + 1} of {arguments.rounds}", flush=True)
        engine.close()
    print(
        f"{streams} streams with an adapter each, {config.num_hidden_layers} layers of {config.num_experts} experts"
    )
    ratios = {}
    for name, taken in seconds.items():
        times = [theirs / ours for theirs, ours in zip(taken, seconds["onebase"], strict=True)]
        ratios[name] = statistics.median(times)
        speed = streams * OUTPUT / statistics.median(taken)
        print(f"{name:42} {speed:8.1f} tokens/s   onebase is {ratios[name]:6.2f} times as fast")
    least = min(ratio for name, ratio in ratios.items() if "one after another" in name)
    print(f"with adapters on experts: {least:.1f} x >= 5 {'reached' if least >= 5 else 'MISSED'}")
    raise SystemExit(least < 5)


if __name__ == "__main__":
    main()
