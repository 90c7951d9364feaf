"""One training run, from a configuration to an adapter's folder. The command line, the demo and jobs all call this.

On disk there is either the finished folder, or a hidden work folder beside it with whole checkpoints, or nothing.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import set_seed

from onebase_adapters.base import BaseSpec, LoadedBase, load_base
from onebase_adapters.errors import DataError
from onebase_training.attention import PACKED_ATTENTION
from onebase_training.batches import plan_batches
from onebase_training.config import TrainConfig
from onebase_training.data import Dataset, Encoded, encode, read_dataset, split
from onebase_training.dequantize import dequantize, dequantized_bytes, keep_unpacked
from onebase_training.estimate import free_memory, settle
from onebase_training.evaluate import Evaluation, Sample, evaluate, mark
from onebase_training.events import Progress, Stage, silent
from onebase_training.loop import Loop, count_steps, history, last_checkpoint
from onebase_training.methods import Method, find_method
from onebase_training.methods.attached import Attached
from onebase_training.model import Trained, trainable_state
from onebase_training.output import write_result
from onebase_training.workspace import Workspace, open_workspace

_BEFORE_FILE = "before.json"


@dataclass(frozen=True)
class TrainResult:
    """What came of a run."""

    output: Path
    before: Evaluation
    """Of the base without the adapter."""
    after: Evaluation
    """Of what was written: the checkpoint with the best held-out loss."""
    steps: int
    parameters: int
    """Trained ones."""
    tokens_per_second: float
    seconds: float
    """Of training, evaluations left out."""


def train(config: TrainConfig, progress: Progress = silent) -> TrainResult:
    """Train and write `config.output`.

    Raises ConfigError, DataError, BaseModelError or StorageError; nothing half-written is left behind.
    """
    workspace = open_workspace(config)
    try:
        result = _train(config, workspace, progress)
    except BaseException:
        if last_checkpoint(workspace.folder) is None:
            workspace.clear()
        raise
    workspace.clear()
    return result


def _train(config: TrainConfig, workspace: Workspace, progress: Progress) -> TrainResult:
    method = find_method(config.method)
    config = config.resolved(learning_rate=method.learning_rate)
    dataset, held_out = read_data(config)
    progress(Stage(f"{len(dataset)} examples to train on, {len(held_out)} held out ({dataset.format})"))
    base = load_for_training(config, method, progress)
    examples, evaluation = _encode(dataset, base, config), _encode(held_out, base, config)
    digests = {"train": dataset.digest, "held_out": held_out.digest}
    workspace.begin(config, data=digests, base=base.shape.fingerprint)
    before = _before(workspace, base, evaluation, config, progress)

    set_seed(config.seed)
    attached = method.attach(base, config)
    model = Trained(attached, base.device)
    lengths = [len(example.input_ids) for example in examples]
    plan = plan_batches(lengths, budget=config.batch_tokens, epochs=config.epochs, seed=config.seed)
    parameters = sum(value.numel() for value in trainable_state(model).values())
    steps = count_steps(plan, config)
    estimate, recomputed = settle(model, examples, plan[: steps * config.accumulate], config)
    progress(Stage(f"{parameters:,} parameters to train, {steps} steps, {estimate}"))
    if recomputed:
        progress(Stage("activations are recomputed in the backward pass, to save memory"))
    set_seed(config.seed)
    loop = Loop(
        model, config, work=workspace.folder, examples=examples, held_out=evaluation, plan=plan, progress=progress
    )
    checkpoint = last_checkpoint(workspace.folder) if config.resume else None
    loop.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)

    progress(Stage("measuring the result"))
    after = evaluate(model, evaluation, base.tokenizer, config)
    sizes = {"format": dataset.format, "examples": len(dataset), "held_out_examples": len(held_out)}
    notes = {
        "base": {
            "model": config.model,
            "fingerprint": base.shape.fingerprint,
            "quantization": method.quantization,
        },
        "method": config.method,
        "data": {**digests, **sizes},
        "settings": config.settings(),
    }
    log = history(workspace.folder)
    write_result(workspace.output, attached.save, notes=notes, before=before, after=after, history=log)
    watch = loop.watch
    return TrainResult(workspace.output, before, after, loop.state.global_step, parameters, watch.speed, watch.busy)


def read_data(config: TrainConfig) -> tuple[Dataset, Dataset]:
    """Training part and held-out part. Raises DataError."""
    dataset = read_dataset(config.data, format=config.format)
    if config.eval_data is None:
        return split(dataset, eval_fraction=config.eval_fraction, seed=config.seed)
    return dataset, read_dataset(config.eval_data, format=config.format)


def load_for_training(config: TrainConfig, method: Method, progress: Progress) -> LoadedBase:
    """The base in the method's format, with the attention that fits the device."""
    spec = BaseSpec(config.model, quantization=method.quantization, device=config.device)
    base = load_base(spec, progress=lambda text: progress(Stage(text)))
    if base.device.type == "cpu":
        base.model.set_attn_implementation(PACKED_ATTENTION)
    extra = dequantized_bytes(base.model)
    if extra and (
        config.dequantize == "always" or (config.dequantize == "auto" and extra * 4 <= free_memory(base.device))
    ):
        dequantize(base.model)
        progress(Stage(f"4-bit weights held as bfloat16 while training: the same values, {extra >> 20} MiB more"))
    elif extra:
        keep_unpacked(base.model)
        progress(Stage("4-bit weights are expanded anew in each step"))
    return base


def _encode(dataset: Dataset, base: LoadedBase, config: TrainConfig) -> list[Encoded]:
    limit = min(config.max_length, base.shape.context)
    encoded = encode(dataset.examples, base.tokenizer, max_length=limit, too_long=config.too_long)
    if not encoded:
        raise DataError(f"No example of {dataset.source} has at most {limit} tokens.", field="max_length")
    return encoded


def _before(
    workspace: Workspace, base: LoadedBase, held_out: Sequence[Encoded], config: TrainConfig, progress: Progress
) -> Evaluation:
    """The base's own marks, measured once in a run however often it is resumed."""
    stored = workspace.folder / _BEFORE_FILE
    if config.resume and stored.exists():
        saved = json.loads(stored.read_text())
        known = [Sample(*sample) for sample in saved["samples"]]
        return Evaluation(saved["loss"], mark(known, held_out), known)
    progress(Stage("measuring the base"))
    plain = Trained(Attached(base.model, lambda _: None), base.device)
    before = evaluate(plain, held_out, base.tokenizer, config)
    samples = [(sample.prompt, sample.expected, sample.generated) for sample in before.samples]
    partial = stored.with_suffix(".partial")
    partial.write_text(json.dumps({"loss": before.loss, "samples": samples}))
    partial.replace(stored)
    return before
