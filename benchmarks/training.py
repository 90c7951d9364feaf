"""Training speed: `onebase train`'s loop against a plain PEFT and transformers script, in turns, on the same model,
data and settings: QLoRA on NF4 with double quantisation, rank 16 on all linear layers, AdamW, in bfloat16, float32
or both. Beside tokens a second stand those a CPU second, which tell more on a machine that others use, too.

The plain script is what people write: examples padded on the right, PEFT's model, transformers' Trainer. Steps hold
as many examples on both sides, and only real tokens count. `--same-length` takes examples of one length, so that
the plain script pads nothing.

    python -m benchmarks.training [--data alpaca-en] [--rounds 3] [--steps 6] [--same-length 128]
        [--arithmetic bf16,float32] [--batch-tokens 1024] [--only onebase]
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from rich.console import Console
from rich.table import Table
from transformers import Trainer, TrainerCallback, TrainingArguments

from examples.prepare import prepare
from onebase_contract.events import Event, Step, silent
from onebase_contract.settings import Arithmetic, TrainConfig
from onebase_engine.base.base_spec import BaseSpec
from onebase_engine.base.load_base import LoadedBase, load_base
from onebase_engine.kernels.bitsandbytes_import import Linear4bit
from onebase_training.data import NO_LOSS, Encoded, encode, read_dataset
from onebase_training.data.encoding.packing import plan_run
from onebase_training.fitting.estimate import settle
from onebase_training.fitting.training_loop import Loop
from onebase_training.methods import lora
from onebase_training.model.arithmetic import DTYPES, measure_speeds
from onebase_training.model.base_for_training import load_for_training
from onebase_training.model.trained_model import Trained


class Clock(TrainerCallback):
    """When each step ended. The first step, which allocates, is not timed."""

    def __init__(self) -> None:
        self.marks: list[tuple[float, float]] = []

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.marks.clear()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.marks.append((time.perf_counter(), time.process_time()))

    def speeds(self, tokens: int) -> tuple[float, float]:
        """Tokens a second and a CPU second, for so many tokens since the first step's end."""
        wall, cpu = (last - first for first, last in zip(self.marks[0], self.marks[-1], strict=True))
        return tokens / wall, tokens / cpu


Side = Callable[[], tuple[float, float]]
"""Trains a few steps; gives tokens a second, and a CPU second."""


def plain_script(
    model: Any, examples: Sequence[Encoded], batch: int, steps: int, pad: int, arithmetic: Arithmetic = "bf16"
) -> Side:
    """The usual script, on a model as `load_base` has it."""
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.compute_dtype = DTYPES[arithmetic]
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    model = get_peft_model(
        model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    tokens: list[int] = []

    def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        width = max(len(row["input_ids"]) for row in rows)
        tokens.append(sum(len(row["input_ids"]) for row in rows))

        def padded(name: str, value: int) -> torch.Tensor:
            return torch.tensor([row[name] + [value] * (width - len(row[name])) for row in rows])

        return {
            "input_ids": padded("input_ids", pad),
            "attention_mask": padded("attention_mask", 0),
            "labels": padded("labels", NO_LOSS),
        }

    rows = [
        {"input_ids": list(one.input_ids), "labels": list(one.labels), "attention_mask": [1] * len(one.input_ids)}
        for one in examples
    ]
    clock = Clock()
    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        max_steps=steps,
        per_device_train_batch_size=batch,
        learning_rate=1e-3,
        bf16=arithmetic == "bf16",
        use_cpu=model.device.type == "cpu",
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, data_collator=collate, callbacks=[clock])

    def run() -> tuple[float, float]:
        tokens.clear()
        trainer.train()
        return clock.speeds(sum(tokens[1:steps]))

    return run


def our_loop(base: LoadedBase, config: TrainConfig, examples: Sequence[Encoded], steps: int, work: Path) -> Side:
    """What `onebase train --method qlora` runs, on a base as `load_for_training` has it."""
    model = Trained(lora.attach(base, config, steps), base.device, arithmetic=config.arithmetic or "bf16")
    lengths = [len(one.input_ids) for one in examples]
    batches = plan_run(lengths, replace(config, epochs=20), world=1)
    settle(model, examples, batches.plan, config)
    clock = Clock()

    def progress(event: Event) -> None:
        if isinstance(event, Step):
            clock.on_step_end()

    def run() -> tuple[float, float]:
        clock.on_train_begin()
        parts = {"examples": examples, "held_out": examples[:1], "batches": batches}
        Loop(model, config, work=work, progress=progress, **parts).train()
        return clock.speeds(sum(lengths[index] for batch in batches.plan[1:] for index in batch))

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="alpaca-en", help="a recipe of `python -m examples.prepare`")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--same-length", type=int, help="cut examples to this, leave out shorter ones")
    parser.add_argument("--arithmetic", default="bf16", help="of both sides; several with commas between")
    parser.add_argument("--batch-tokens", type=int, default=1024, help="of a step")
    parser.add_argument("--only", default="", help="the sides whose names begin so")
    options = parser.parse_args()
    console = Console()
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        file = (
            prepare(options.data, work / "data", limit=400, eval_limit=1, progress=lambda _: None) / "train.jsonl"
        )
        tokenizer = load_base(BaseSpec(device="cpu")).tokenizer
        limit = options.same_length or 1024
        examples = encode(read_dataset(file).examples, tokenizer, max_length=limit, too_long="cut")
        if options.same_length:
            examples = [one for one in examples if len(one.input_ids) == limit]
        mean = statistics.mean(len(one.input_ids) for one in examples)
        budget, pad, steps = options.batch_tokens, tokenizer.pad_token_id or 0, options.steps
        sides: dict[str, Side] = {}
        for kind in options.arithmetic.split(","):
            if "plain script".startswith(options.only):
                batch = max(1, round(budget / mean))
                plain = load_base(BaseSpec(device="cpu")).model
                sides[f"plain script, {kind}"] = plain_script(plain, examples, batch, steps, pad, kind)
            if "onebase train".startswith(options.only):
                config = TrainConfig(
                    data=work, output=work, max_steps=steps, eval_every=10**6, learning_rate=1e-3,
                    batch_tokens=budget, arithmetic=kind, device="cpu",
                )  # fmt: skip
                base = load_for_training(config, "nf4", kind, silent)
                sides[f"onebase train, {kind}"] = our_loop(base, config, examples, steps, work / kind)
        speeds: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
        for _ in range(options.rounds):
            for name, run in sides.items():
                speeds[name].append(run())
    table = Table(
        "QLoRA", "tokens/s (median)", "of each round", "a CPU second", "times the first",
        title=f"{options.data}, mean {mean:.0f} tokens, {measure_speeds()}",
    )  # fmt: skip
    first = next(iter(speeds.values()))
    for name, values in speeds.items():
        wall, cpu = ([pair[kind] for pair in values] for kind in (0, 1))
        ratio = statistics.median(mine / theirs for mine, (_, theirs) in zip(cpu, first, strict=True))
        each = ", ".join(f"{value:.0f}" for value in wall)
        table.add_row(name, f"{statistics.median(wall):.0f}", each, f"{statistics.median(cpu):.0f}", f"{ratio:.2f}")
    console.print(table)
    console.print("The last column compares CPU seconds: the median of the rounds' ratios.")


if __name__ == "__main__":
    main()
