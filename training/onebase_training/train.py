"""One training run, from a configuration to an adapter's folder. The command line, the demo and jobs all call this.

On disk there is either the finished folder, or a hidden work folder beside it with whole checkpoints, or nothing.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import set_seed

from onebase_adapters.base import BaseSpec, LoadedBase, load_base
from onebase_adapters.errors import ConfigError, DataError
from onebase_training.attention import PACKED_ATTENTION
from onebase_training.batches import plan_batches
from onebase_training.config import TrainConfig
from onebase_training.data import Dataset, Encoded, encode, encode_for_head, read_dataset, read_datasets, split
from onebase_training.dequantize import dequantize, dequantized_bytes, keep_unpacked
from onebase_training.estimate import free_memory, settle
from onebase_training.evaluate import Evaluation, Sample, evaluate, mark
from onebase_training.events import Progress, Stage, silent
from onebase_training.heads import classes_of, with_head
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
    config = replace(config, head=config.head or method.head or base.shape.encoder)
    classes = classes_of(dataset) if config.head else ()
    examples, evaluation = (_encode(part, base, config, classes) for part in (dataset, held_out))
    digests = {"train": dataset.digest, "held_out": held_out.digest}
    workspace.begin(config, data=digests, base=base.shape.fingerprint)
    before = _before(workspace, base, dataset, evaluation, config, progress)

    set_seed(config.seed)
    lengths = [len(example.input_ids) for example in examples]
    plan = plan_batches(lengths, budget=config.batch_tokens, epochs=config.epochs, seed=config.seed)
    steps = count_steps(plan, config)
    attached = method.attach(base, config, steps)
    if config.head:
        attached = with_head(attached, base, dataset, config)
    _check_room(attached, base, max(lengths))
    model = Trained(attached, base.device, first_position=base.shape.first_position)
    parameters = sum(value.numel() for value in trainable_state(model).values())
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
        **attached.notes,
    }
    log = history(workspace.folder)
    write_result(workspace.output, attached.save, notes=notes, before=before, after=after, history=log)
    watch = loop.watch
    return TrainResult(workspace.output, before, after, loop.state.global_step, parameters, watch.speed, watch.busy)


def _check_room(attached: Attached, base: LoadedBase, longest: int) -> None:
    virtual = len(attached.places) + attached.prefix_length
    if longest + virtual > base.shape.context:
        raise ConfigError(
            f"{virtual} virtual tokens and the longest example's {longest} do not fit into the base's context of "
            f"{base.shape.context}. Use a smaller --prompt-length or --max-length.",
            field="prompt_length",
        )


def read_data(config: TrainConfig) -> tuple[Dataset, Dataset]:
    """Training part and held-out part. Raises DataError."""
    dataset = read_datasets(config.files, format=config.format)
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
    if method.expanded and extra and config.dequantize == "never":
        raise ConfigError(f"{config.method} needs the base's weights expanded.", field="dequantize")
    roomy = config.dequantize == "auto" and extra * 4 <= free_memory(base.device)
    if extra and (method.expanded or config.dequantize == "always" or roomy):
        dequantize(base.model)
        progress(Stage(f"4-bit weights held as bfloat16 while training: the same values, {extra >> 20} MiB more"))
    elif extra:
        keep_unpacked(base.model)
        progress(Stage("4-bit weights are expanded anew in each step"))
    return base


def _encode(dataset: Dataset, base: LoadedBase, config: TrainConfig, classes: tuple[str, ...]) -> list[Encoded]:
    limit = min(config.max_length, base.shape.context)
    if classes:
        encoded = encode_for_head(
            dataset.examples, base.tokenizer, classes, max_length=limit, too_long=config.too_long
        )
    else:
        encoded = encode(dataset.examples, base.tokenizer, max_length=limit, too_long=config.too_long)
    if not encoded:
        raise DataError(f"No example of {dataset.source} has at most {limit} tokens.", field="max_length")
    return encoded


def _before(
    workspace: Workspace,
    base: LoadedBase,
    dataset: Dataset,
    held_out: Sequence[Encoded],
    config: TrainConfig,
    progress: Progress,
) -> Evaluation:
    """The base's own marks (with a head: an untrained one's), measured once, however often a run is resumed."""
    stored = workspace.folder / _BEFORE_FILE
    if config.resume and stored.exists():
        saved = json.loads(stored.read_text())
        known = [Sample(*sample) for sample in saved["samples"]]
        return Evaluation(saved["loss"], mark(known, held_out), known)
    progress(Stage("measuring the base"))
    attached = Attached(base.model, lambda _: None)
    if config.head:
        set_seed(config.seed)
        attached = with_head(attached, base, dataset, config)
    plain = Trained(attached, base.device, first_position=base.shape.first_position)
    before = evaluate(plain, held_out, base.tokenizer, config)
    samples = [(sample.prompt, sample.expected, sample.generated) for sample in before.samples]
    partial = stored.with_suffix(".partial")
    partial.write_text(json.dumps({"loss": before.loss, "samples": samples}))
    partial.replace(stored)
    return before
