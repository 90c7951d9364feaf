"""What a GPU makes of it: the kernels' tests on the device, every method beside PEFT, and an 8B-shaped base of
random numbers, decoding and training, beside transformers and PEFT on the same weights.

    python -m benchmarks.gpu --out DIR [--steps machine,kernels] [--sizes 8b|tiny] [--quantization nf4|none]

Steps run in the order given; each appends its results to DIR/results.jsonl as soon as it has them, so that being
cut off loses only what runs; one that fails leaves its error there, and the next one begins. No model file is
needed.

    machine   versions, the device, what it copies and multiplies in a second
    kernels   tests/adapters/cuda_cases.py on the device
    parity    tests/parity/test_methods.py with the served model on the device
    decode    milliseconds a decoding step by streams and adapters, as a fraction of its floor: the bytes of
              weights, adapters and cache that it must read, over the measured bandwidth of a copy
    eager     some of the same without captured steps
    prefill   a prompt's first token
    peers     generate() of transformers, and of PEFT with a batch of mixed adapters, on the same weights
    profile   one decoding step's dearest kernels, launches and gaps
    products  the 4-bit product alone, by rows, beside bitsandbytes' two ways
    train     a QLoRA step of 4 x 1024 tokens, and a plain PEFT script's

Everything can be tried without a GPU: `TRITON_INTERPRET=1 python -m benchmarks.gpu --out DIR --sizes tiny` has the
GPU's kernels interpreted, and replays steps by running them again.
"""

import argparse
import copy
import gc
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.offline import random_prompt
from benchmarks.peers import generate_seconds
from onebase_adapters.primitives.instruction_set import LowRank
from onebase_adapters.primitives.lowered_adapter import LoweredAdapter
from onebase_engine import startup
from onebase_engine.base.base_spec import BaseSpec
from onebase_engine.base.describe import cache_shape, describe_base
from onebase_engine.base.load_base import LoadedBase
from onebase_engine.engine import Engine
from onebase_engine.engine_config import EngineConfig
from onebase_engine.kernels.bitsandbytes_import import Linear4bit, Params4bit
from onebase_engine.request import EngineRequest, SamplingParams
from onebase_engine.runner import batched_model as served
from onebase_engine.runner.paged_attention import ATTENTION_NAME, register_attention
from onebase_engine.startup import start_engine

INTERPRETED = bool(os.environ.get("TRITON_INTERPRET"))
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Sizes:
    """How large everything is."""

    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    vocab: int
    streams: tuple[int, ...]
    adapters: tuple[int, ...]
    rank: int
    prompt: int
    """Tokens of each prompt."""
    steps: int
    """Decoding steps that are timed."""
    copied: int
    """Bytes."""
    multiplied: int
    """Rows of a square matrix."""
    trained: tuple[int, int]
    """Examples and tokens of each."""


SIZES = {
    "8b": Sizes(
        32, 4096, 14336, 32, 8, 128256, (1, 16, 64, 128), (0, 1, 16, 100), 16, 64, 24, 4 << 30, 8192, (4, 1024)
    ),
    "tiny": Sizes(2, 64, 128, 4, 2, 512, (1, 5), (0, 1, 3), 4, 6, 2, 1 << 20, 64, (2, 16)),
}


class Out:
    """Where results go: a line of JSON each, in a file and on the terminal."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file = folder / "results.jsonl"
        self.started = time.perf_counter()

    def __call__(self, step: str, **result: Any) -> None:
        line = json.dumps({"step": step, "at": round(time.perf_counter() - self.started, 1), **result})
        with self._file.open("a") as file:
            file.write(line + "\n")
            os.fsync(file.fileno())
        print(line if len(line) < 600 else line[:600] + " ...", flush=True)


def wait() -> None:
    """For the device."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def median_seconds(work: Callable[[], Any], times: int = 10) -> float:
    """The median time of one call, after two to warm up."""
    found = []
    for number in range(times + 2):
        wait()
        started = time.perf_counter()
        work()
        wait()
        if number > 1:
            found.append(time.perf_counter() - started)
    return statistics.median(found)


def forget_peak() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()


def peak_gib() -> float:
    """The most memory taken on the device since `forget_peak`."""
    return round(torch.cuda.max_memory_allocated() / 2**30, 2) if DEVICE.type == "cuda" else 0.0


class Bench:
    """What the steps share: made when first asked for."""

    def __init__(self, out: Out, sizes: Sizes, quantization: str) -> None:
        self.out = out
        self.sizes = sizes
        self.quantization = quantization
        self.scratch = Path(tempfile.mkdtemp())

    @cached_property
    def bandwidth(self) -> float:
        """Bytes a second of a copy on the device, read and written."""
        source = torch.empty(self.sizes.copied, dtype=torch.uint8, device=DEVICE).random_()
        target = torch.empty_like(source)
        return 2 * source.nbytes / median_seconds(lambda: target.copy_(source))

    @cached_property
    def config(self) -> LlamaConfig:
        sizes = self.sizes
        return LlamaConfig(
            vocab_size=sizes.vocab, hidden_size=sizes.hidden, intermediate_size=sizes.inner,
            num_hidden_layers=sizes.layers, num_attention_heads=sizes.heads, num_key_value_heads=sizes.kv_heads,
            max_position_embeddings=8192, eos_token_id=2, bos_token_id=1, pad_token_id=0, tie_word_embeddings=False,
            rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        )  # fmt: skip

    @cached_property
    def plain(self) -> Any:
        """The random base as transformers makes it."""
        torch.manual_seed(0)
        started = time.perf_counter()
        with DEVICE:
            model = AutoModelForCausalLM.from_config(self.config, dtype=torch.bfloat16, attn_implementation="sdpa")
        if self.quantization != "none":
            quantise(model)
        model.eval().requires_grad_(False)
        wait()
        self.out("base", seconds=round(time.perf_counter() - started, 1), gib=round(read_bytes(model) / 2**30, 2))
        return model

    @cached_property
    def engine(self) -> Engine:
        """Over weights that `plain` has, too."""
        register_attention()
        model = share(self.plain)
        model.set_attn_implementation(ATTENTION_NAME)
        base = LoadedBase(
            model, SimpleNamespace(eos_token_id=None), describe_base(model, "random", "random"), DEVICE
        )  # type: ignore[arg-type]
        most = max(self.sizes.streams) * (self.sizes.prompt + self.sizes.steps + 32)
        gib = most * cache_shape(self.config).token_bytes / 2**30
        config = EngineConfig(
            base=BaseSpec("random"), cache_gib=2 * gib, max_adapters=max(self.sizes.adapters), reuse_prefixes=False
        )
        with patch.object(startup, "load_base", lambda *_, **__: base), interpreted():
            engine = start_engine(config)
        if INTERPRETED:
            engine.model.replay_decodes(spare_block=engine.pool.total - 1, capture=lambda run: run)  # type: ignore[union-attr]
        return engine

    @cached_property
    def adapters(self) -> list[str]:
        """Digests of random low-rank updates of all linear sites but the head."""
        generator = torch.Generator(DEVICE).manual_seed(1)
        names = []
        for number in range(max(self.sizes.adapters)):
            updates = tuple(
                LowRank(
                    site.name,
                    *(
                        torch.randn(shape, generator=generator, device=DEVICE, dtype=torch.bfloat16) * 0.02
                        for shape in ((self.sizes.rank, site.in_features), (site.out_features, self.sizes.rank))
                    ),
                    2.0,
                )
                for site in self.engine.model.shape.sites.values()
                if site.name != "lm_head"
            )
            name = f"adapter-{number}"
            self.engine.residency._folders[name] = Path(name)
            self.engine.residency.admit(name, LoweredAdapter(name, "LORA", updates))
            names.append(name)
        return names

    def floor(self, streams: int, adapters: int) -> float:
        """Seconds that a step's bytes take."""
        residency = self.engine.residency
        size = read_bytes(self.plain) + adapters * residency.bytes / max(1, residency.loaded)
        context = self.sizes.prompt + self.sizes.steps // 2
        return (size + streams * context * cache_shape(self.config).token_bytes) / self.bandwidth

    def mixes(self) -> list[tuple[int, int]]:
        """(streams, adapters among them)."""
        return [(n, k) for n in self.sizes.streams for k in self.sizes.adapters if k <= n]


@contextmanager
def interpreted() -> Iterator[None]:
    """The GPU's kernels also where there is no GPU."""
    if not INTERPRETED:
        yield
        return
    from onebase_engine.kernels.cuda import backend

    with patch.object(served, "choose_kernels", lambda *_: backend):
        yield


def quantise(model: nn.Module) -> None:
    """In place, all linear modules but the head, as `load_base` has transformers do it."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            small = Linear4bit(
                module.in_features, module.out_features, bias=False, compute_dtype=torch.bfloat16,
                compress_statistics=True, quant_type="nf4", device="meta",
            )  # fmt: skip
            small.weight = Params4bit(
                module.weight.data, requires_grad=False, compress_statistics=True, quant_type="nf4"
            )
            small.to(DEVICE)
            small.support_avx512bf16_for_cpu = False
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, small)
    model.is_loaded_in_4bit = True  # type: ignore[assignment]


def share(model: Any) -> Any:
    """A model of its own on the same weights."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def read_bytes(model: Any) -> int:
    """What a decoding step reads of a model: all but the embedding."""
    total = 0
    for name, parameter in model.named_parameters():
        if "embed_tokens" in name:
            continue
        total += parameter.nbytes
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            total += state.absmax.nbytes + (state.state2.absmax.nbytes if state.nested else 0)
    return total


def machine(bench: Bench) -> None:
    size = bench.sizes.multiplied
    a, b = torch.randn(2, size, size, device=DEVICE, dtype=torch.bfloat16)
    bench.out(
        "machine",
        device=torch.cuda.get_device_name() if DEVICE.type == "cuda" else "cpu",
        python=sys.version.split()[0],
        versions={
            name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft", "bitsandbytes")
        }
        | {"triton": importlib.metadata.version("triton"), "cuda": torch.version.cuda},
        copy_gb_s=round(bench.bandwidth / 1e9),
        bf16_tflop_s=round(2 * size**3 / median_seconds(lambda: a @ b) / 1e12, 1),
    )


def tests(bench: Bench, step: str, *arguments: str) -> None:
    """A pytest run of its own."""
    started = time.perf_counter()
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "-W",
        "default",
        "--tb=short",
        "-rf",
        *arguments,
    ]
    environment = os.environ | {"ONEBASE_TEST_DEVICE": DEVICE.type}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR", "E  "))]
    last = (done.stdout.strip() or done.stderr).splitlines()[-1:]
    bench.out(
        step, code=done.returncode, last=last, failed=failed[:60], seconds=round(time.perf_counter() - started, 1)
    )
    if done.returncode:
        (bench.out._file.parent / f"{step}.log").write_text(done.stdout[-60000:] + done.stderr[-4000:])


def kernels(bench: Bench) -> None:
    tests(bench, "kernels", "--noconftest", "tests/adapters/cuda_cases.py")


def parity(bench: Bench) -> None:
    tests(bench, "parity", "tests/parity/test_methods.py")


def start(bench: Bench, streams: int, adapters: int, steps: int) -> None:
    """Bring so many sequences to where all of them decode."""
    engine = bench.engine
    sampling = SamplingParams(max_tokens=steps + 24, temperature=0.0, ignore_eos=True)
    for number in range(streams):
        adapter = bench.adapters[number % adapters] if adapters else None
        prompt = random_prompt(bench.sizes.prompt, engine.info.vocab, number)
        if (refused := engine.submit(EngineRequest(str(number), prompt, sampling, adapter))) is not None:
            raise RuntimeError(refused.error)
    while len(engine.scheduler.running) < streams or any(s.missing > 1 for s in engine.scheduler.running):
        engine.step()


def decode(bench: Bench, step: str = "decode", every: int = 1) -> None:
    """By streams and adapters; of the mixes every so many."""
    for streams, adapters in bench.mixes()[::every]:
        forget_peak()
        start(bench, streams, adapters, bench.sizes.steps)
        for _ in range(3):
            bench.engine.step()
        taken = []
        for _ in range(bench.sizes.steps):
            started = time.perf_counter()
            bench.engine.step()
            taken.append(time.perf_counter() - started)
        bench.engine.abort_all()
        middle, floor = statistics.median(taken), bench.floor(streams, adapters)
        bench.out(
            step, base=bench.quantization, streams=streams, adapters=adapters, ms=round(1000 * middle, 3),
            slowest_ms=round(1000 * max(taken), 2), tokens_s=round(streams / middle, 1),
            floor_ms=round(1000 * floor, 3), of_floor=round(floor / middle, 3), peak_gib=peak_gib(),
        )  # fmt: skip


def eager(bench: Bench) -> None:
    model: Any = bench.engine.model
    kept, model._replays = model._replays, None
    try:
        decode(bench, "eager", every=4)
    finally:
        model._replays = kept


def prefill(bench: Bench) -> None:
    engine, sizes = bench.engine, bench.sizes
    for tokens, streams in ((8 * sizes.prompt, 1), (sizes.prompt, max(sizes.streams))):
        found = []
        for number in range(4):
            for stream in range(streams):
                prompt = random_prompt(tokens, engine.info.vocab, 1000 * number + stream)
                sampling = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
                engine.submit(EngineRequest(f"{number} {stream}", prompt, sampling, None))
            wait()
            started = time.perf_counter()
            while engine.busy:
                engine.step()
            found.append(time.perf_counter() - started)
        seconds = statistics.median(found[1:])
        bench.out(
            "prefill", base=bench.quantization, tokens=tokens, streams=streams, ms=round(1000 * seconds, 2),
            tokens_s=round(tokens * streams / seconds),
        )  # fmt: skip


def peers(bench: Bench) -> None:
    """What one would do without: milliseconds of a step from two lengths of generate()."""
    from peft import LoraConfig, get_peft_model

    sizes, model = bench.sizes, share(bench.plain)

    def measure(name: str, run: Any, streams: int, adapters: int, **options: Any) -> None:
        prompts = torch.tensor([random_prompt(sizes.prompt, sizes.vocab, n) for n in range(streams)], device=DEVICE)
        short, long = 2, 2 + max(2, sizes.steps // 2)
        forget_peak()
        generate_seconds(run, prompts, 2, **options)
        taken = [generate_seconds(run, prompts, tokens, **options) for tokens in (short, long)]
        seconds = (taken[1] - taken[0]) / (long - short)
        bench.out(
            "peers", base=bench.quantization, peer=name, streams=streams, adapters=adapters,
            ms=round(1000 * seconds, 2), tokens_s=round(streams / seconds, 1), peak_gib=peak_gib(),
        )  # fmt: skip

    for streams in sizes.streams:
        measure("transformers", model, streams, 0)
    names = sorted({name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, nn.Linear)})
    config = LoraConfig(
        r=sizes.rank, lora_alpha=2 * sizes.rank, init_lora_weights=False, task_type="CAUSAL_LM",
        target_modules=[name for name in names if name != "lm_head"],
    )  # fmt: skip
    several = sizes.adapters[min(2, len(sizes.adapters) - 1)]
    run = get_peft_model(model, config, adapter_name="adapter-0")
    for number in range(1, several):
        run.add_adapter(f"adapter-{number}", config)
    for parameter in run.parameters():
        if parameter.requires_grad or parameter.dtype == torch.float32:
            parameter.data = parameter.data.to(torch.bfloat16)  # what is fastest for it
    run.eval()
    for streams in sizes.streams:
        measure("PEFT, one adapter", run, streams, 1)
        if streams >= several:
            mixed = [f"adapter-{number % several}" for number in range(streams)]
            measure("PEFT, mixed batch", run, streams, several, adapter_names=mixed)


def profiled(bench: Bench) -> None:
    """A profile of steps as they run."""
    sizes = bench.sizes
    several = sizes.adapters[min(2, len(sizes.adapters) - 1)]
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (DEVICE.type == "cuda")
    for streams, adapters in ((1, 0), (1, 1), (64, 0), (64, several)):
        streams = min(streams, max(sizes.streams))
        start(bench, streams, min(adapters, streams), 16)
        for _ in range(3):
            bench.engine.step()
        wait()
        count, started = 4, time.perf_counter()
        with profile(activities=activities) as found:
            for _ in range(count):
                bench.engine.step()
            wait()
        seconds = (time.perf_counter() - started) / count
        bench.engine.abort_all()
        events = [e for e in found.key_averages() if DEVICE.type == "cpu" or "CUDA" in str(e.device_type)]
        time_of = "self_device_time_total" if DEVICE.type == "cuda" else "self_cpu_time_total"
        events.sort(key=lambda e: -getattr(e, time_of))
        busy = sum(getattr(e, time_of) for e in events) / count
        rows = [
            [
                e.key[:90],
                e.count / count,
                round(getattr(e, time_of) / count, 1),
                round(getattr(e, time_of) / e.count, 2),
            ]
            for e in events[:24]
        ]
        bench.out(
            "profile", base=bench.quantization, streams=streams, adapters=adapters, wall_us=round(1e6 * seconds),
            busy_us=round(busy), launches=sum(e.count for e in events) / count, name_count_us_each=rows,
        )  # fmt: skip


def products(bench: Bench) -> None:
    """Microseconds of a 4-bit product over weights that no cache holds, by rows: ours, bitsandbytes' fused kernel,
    and the weight expanded for cuBLAS, which is how bitsandbytes multiplies where `fused_chosen` is false."""
    if DEVICE.type != "cuda" or bench.quantization == "none":
        return
    from bitsandbytes.backends.cuda import ops

    from onebase_engine.kernels.cuda.matmul4bit import Packed

    def replayed(runs: Sequence[Callable[[], Any]]) -> float:
        for run in runs:
            run()
        wait()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for run in runs:
                run()
        return round(1e6 * median_seconds(graph.replay, 5) / len(runs), 1)

    for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj", "mlp.down_proj"):
        linears = [layer.get_submodule(name) for layer in bench.plain.model.layers]
        weight = linears[0].weight
        ours = [Packed([linear]) for linear in linears]
        for rows in (1, 4, 8, 16, 32, 64, 128):
            x = torch.randn(rows, linears[0].in_features, device=DEVICE, dtype=torch.bfloat16)
            theirs = [
                (x, linear.weight.view(-1, 1), state.shape, state.absmax, state.blocksize, "nf4")
                for linear in linears
                for state in [linear.weight.quant_state]
            ]
            bench.out(
                "products", site=name, shape=list(weight.quant_state.shape), rows=rows,
                ours_us=replayed([partial(product, x) for product in ours]),
                fused_us=replayed([partial(ops._gemm_4bit_kernel_impl, *each) for each in theirs]),
                expanded_us=replayed([partial(ops._dequant_linear_fallback, *each) for each in theirs]),
                fused_chosen=ops._gemm_4bit_use_custom_fn(0, x.dtype, rows, *weight.quant_state.shape),
                floor_us=round(1e6 * (weight.nbytes + weight.quant_state.absmax.nbytes) / bench.bandwidth, 1),
            )  # fmt: skip


def train(bench: Bench) -> None:
    """Ours first: the plain script makes norms, embedding and head float32."""
    from benchmarks.training import our_loop, plain_script
    from onebase_contract.events import silent
    from onebase_contract.settings import TrainConfig
    from onebase_training.data import Encoded
    from onebase_training.data.examples import Example
    from onebase_training.model import base_for_training

    bench.__dict__.pop("engine", None)
    count, length = bench.sizes.trained
    steps = 5
    examples = []
    for number in range(count * steps):
        ids = random_prompt(length, bench.sizes.vocab, number)
        examples.append(Encoded(ids, ids, Example(number, completion="random"), 0))
    for side in ("onebase, expanded", "onebase, 4-bit", "plain PEFT"):
        gc.collect()
        forget_peak()
        model = share(bench.plain)
        base = LoadedBase(
            model, SimpleNamespace(eos_token_id=None), describe_base(model, "random", "random"), DEVICE  # type: ignore[arg-type]
        )  # fmt: skip
        try:
            if side == "plain PEFT":
                speed, _ = plain_script(model, examples, count, steps, 0)()
            else:
                config = TrainConfig(
                    data=bench.scratch, output=bench.scratch, max_steps=steps, eval_every=10**6, learning_rate=1e-4,
                    batch_tokens=count * length, dequantize="always" if "expanded" in side else "never",
                )  # fmt: skip
                with patch.object(base_for_training, "load_base", lambda *_, base=base, **__: base):
                    base = base_for_training.load_for_training(config, "nf4", "bf16", silent)
                speed, _ = our_loop(base, config, examples, steps, bench.scratch / side)()
        except (RuntimeError, MemoryError) as error:
            bench.out("train", side=side, error=str(error)[:300], peak_gib=peak_gib())
            continue
        bench.out(
            "train",
            side=side,
            ms=round(1000 * count * length / speed, 1),
            tokens_s=round(speed),
            peak_gib=peak_gib(),
        )
        del model, base


STEPS: dict[str, Callable[[Bench], None]] = {
    "machine": machine,
    "kernels": kernels,
    "parity": parity,
    "decode": decode,
    "eager": eager,
    "prefill": prefill,
    "peers": peers,
    "profile": profiled,
    "products": products,
    "train": train,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", default=",".join(STEPS))
    parser.add_argument("--sizes", choices=SIZES, default="8b")
    parser.add_argument("--quantization", choices=("nf4", "none"), default="nf4")
    parser.add_argument("--streams", help="others than the sizes'")
    parser.add_argument("--adapters", help="others than the sizes'")
    options = parser.parse_args()
    sizes = SIZES[options.sizes]
    changed = {
        name: tuple(map(int, value.split(",")))
        for name in ("streams", "adapters")
        if (value := getattr(options, name)) is not None
    }
    bench = Bench(Out(options.out), Sizes(**vars(sizes) | changed), options.quantization)
    for name in options.steps.split(","):
        try:
            STEPS[name](bench)
        except Exception:
            bench.out(name, error=traceback.format_exc()[-1500:])


if __name__ == "__main__":
    main()
