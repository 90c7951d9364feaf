"""One training run, from a configuration to an adapter's folder. The command line, the demo and jobs all call this.

On disk there is either the finished folder, or a hidden work folder beside it with whole checkpoints, or nothing.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import set_seed

from onebase_adapters.atomic_files import staged_directory
from onebase_adapters.errors import AdapterError, ConfigError, DataError
from onebase_contract.events import Progress, Stage, silent
from onebase_contract.run_folder import Workspace, open_workspace
from onebase_contract.settings import TrainConfig
from onebase_engine.base.base_spec import BaseSpec
from onebase_engine.base.load_base import LoadedBase
from onebase_engine.kernels.device import peak_memory
from onebase_training.data import Dataset, Encoded
from onebase_training.data.data_check import check, describe
from onebase_training.data.encoding.encode import encode_whole
from onebase_training.data.encoding.encode_template import encode_with
from onebase_training.data.encoding.packing import passes_of, plan_batches, plan_examples, tokens_of_pass
from onebase_training.data.task_kind import classes_of
from onebase_training.evaluation.answers import model_answers, served_answers
from onebase_training.evaluation.evaluation_result import Evaluation, Sample, asked, mark
from onebase_training.evaluation.held_out_loss import classify, measure
from onebase_training.fitting import fsdp
from onebase_training.fitting.checkpoints import best_checkpoint, history, last_checkpoint, restore, step_of
from onebase_training.fitting.distributed import (
    Ranks,
    barrier,
    gathered,
    leave_deepspeed,
    take_own_gpu,
    this_process,
)
from onebase_training.fitting.early_stopping import Stopped, early_stop
from onebase_training.fitting.estimate import settle
from onebase_training.fitting.training_loop import Loop, count_steps
from onebase_training.methods import classification_head as heads
from onebase_training.methods.attach import Attach, find_method, start_from
from onebase_training.methods.classification_head import with_head
from onebase_training.methods.hard_prompt import choose, write_template
from onebase_training.model.attached import Attached
from onebase_training.model.base_for_training import load_for_training
from onebase_training.model.trained_model import Trained, trainable_state
from onebase_training.result_folder import versions, write_adapter, write_marks
from onebase_training.run_plan import _with_peaks, check_room, encode_part, read_data, with_arithmetic
from onebase_training.run_result import TrainResult

_BEFORE_FILE = "before.json"


def train(config: TrainConfig, progress: Progress = silent, *, before: Evaluation | None = None) -> TrainResult:
    """Train and write `config.output`. `before`: the base's own marks on this very data, where they are known.

    Raises ConfigError, DataError, BaseModelError or StorageError; nothing half-written is left behind.
    """
    ranks = this_process()
    if config.fsdp and ranks.world == 1:
        raise ConfigError(
            "fsdp spreads a run over processes: torchrun --nproc-per-node N starts them.", field="fsdp"
        )
    take_own_gpu()
    if not ranks.first:
        return _train(config, Workspace.of(config), silent, ranks, before)
    workspace = open_workspace(config)
    try:
        result = _train(config, workspace, progress, ranks, before)
    except BaseException:
        if last_checkpoint(workspace.folder) is None:
            workspace.clear()
        raise
    finally:
        workspace.let_go()
    workspace.clear()
    return result


def _train(
    config: TrainConfig, workspace: Workspace, progress: Progress, ranks: Ranks, before: Evaluation | None
) -> TrainResult:
    method = find_method(config.method)
    config = _with_peaks(
        config.resolved(learning_rate=method.learning_rate, head_learning_rate=heads.LEARNING_RATE)
    )
    config = with_arithmetic(config, workspace, progress)
    dataset, held_out = read_data(config)
    base = load_for_training(config, method.quantization, progress, expanded=method.expanded)
    limit = min(config.max_length, base.shape.context)
    sequences = encode_whole(dataset.examples, base.tokenizer)
    found = check(dataset, sequences, max_length=limit, held_out=held_out, samples=0)
    for line in describe(found):
        progress(Stage(line))
    config = replace(config, head=config.head or method.head or base.shape.encoder)
    if method.attach is None and config.head:
        raise ConfigError(f"{config.method} has no parameters, and so no classifier.", field="method")
    classes = classes_of(dataset) if config.head else ()
    examples = encode_part(dataset, base, config, classes, sequences)
    evaluation = encode_part(held_out, base, config, classes)
    config = replace(config, batch_tokens=tokens_of_pass([len(one.input_ids) for one in examples], config))
    digests = {"train": dataset.digest, "held_out": held_out.digest}
    if ranks.first:
        workspace.begin(config, data=digests, base=base.shape.fingerprint)
    if before is None:
        before = _before(workspace, base, dataset, evaluation, config, progress, ranks)

    if method.attach is None:
        fitted = _choose(base, dataset, held_out, config, progress)
    else:
        fitted = _fit(method.attach, base, dataset, examples, evaluation, config, workspace, progress, ranks)

    progress(Stage("measuring the result"))
    model = fitted.model
    loss = measure(model, fitted.held_out, config.batch_tokens, progress).loss
    fsdp.reshard(model)
    sizes = {"format": dataset.format, "examples": len(dataset), "held_out_examples": len(held_out)}
    sizes |= {"near_duplicates": sum(map(len, found.duplicates)), "leaks": len(found.leaks)}
    base_notes = {"model": config.model, "fingerprint": base.shape.fingerprint, "quantization": method.quantization}
    notes = {
        "base": base_notes,
        "method": config.method,
        "data": {**digests, **sizes},
        "settings": config.settings(),
        "versions": versions(),
        **model.attached.notes,
    }
    result = TrainResult(
        output=workspace.output,
        before=before,
        after=Evaluation(loss, None, []),
        steps=fitted.steps,
        parameters=fitted.parameters,
        tokens_per_second=fitted.tokens_per_second,
        seconds=fitted.seconds,
        peak_memory=peak_memory(base.device),
        stopped=fitted.stopped,
        notes=notes,
        history=history(workspace.folder),
        lengths=[len(example.input_ids) for example in examples],
    )
    answers = _model_answers(model, fitted.held_out, base, config, progress)
    with gathered(model), fsdp.whole(model):
        if ranks.first:
            with staged_directory(workspace.output) as folder:
                write_adapter(folder, model.attached.save, notes)
                if answers is None:
                    answers = _answers_of(folder, fitted, base, config, ranks, progress)
                result = replace(result, after=Evaluation(loss, mark(answers, fitted.held_out), answers))
                write_marks(folder, result, base.shape.hub_id)
    barrier()
    return result


def _model_answers(
    model: Trained, examples: Sequence[Encoded], base: LoadedBase, config: TrainConfig, progress: Progress
) -> list[Sample] | None:
    """What the trained model itself answers; None: that is for the code that serves it. All processes must call."""
    if not config.metric_examples:
        return []
    if model.attached.head is not None:
        return classify(model, examples, base.tokenizer, config.batch_tokens)
    if not model.paired:
        return None
    some = asked(examples, config.metric_examples)
    return model_answers(model, some, base.tokenizer, max_new_tokens=config.max_new_tokens, progress=progress)


def _answers_of(
    folder: Path, fitted: "_Fitted", base: LoadedBase, config: TrainConfig, ranks: Ranks, progress: Progress
) -> list[Sample]:
    """What users of the written folder will be answered."""
    some, limit = asked(fitted.held_out, config.metric_examples), config.max_new_tokens
    whole = config.method == "full"
    spec = BaseSpec(str(folder) if whole else config.model, device=config.device)
    adapter = None if whole or find_method(config.method).attach is None else folder
    leave_deepspeed()
    try:
        return served_answers(spec, adapter, some, max_new_tokens=limit, progress=progress)
    except AdapterError as error:
        if ranks.world > 1:
            progress(Stage(f"no metric, since this adapter is not served: {error}"))
            return []
        progress(Stage(f"answers by transformers, since this adapter is not served: {error}"))
        return model_answers(fitted.model, some, base.tokenizer, max_new_tokens=limit, progress=progress)


def _trained(attached: Attached, base: LoadedBase, config: TrainConfig) -> Trained:
    return Trained(
        attached, base.device, first_position=base.shape.first_position, arithmetic=config.arithmetic or "bf16"
    )


@dataclass(frozen=True)
class _Fitted:
    """A model that has learned, and the held-out part as it sees it."""

    model: Trained
    held_out: Sequence[Encoded]
    parameters: int
    steps: int
    tokens_per_second: float
    seconds: float
    stopped: Stopped


def _fit(
    attach: Attach,
    base: LoadedBase,
    dataset: Dataset,
    examples: Sequence[Encoded],
    held_out: Sequence[Encoded],
    config: TrainConfig,
    workspace: Workspace,
    progress: Progress,
    ranks: Ranks,
) -> _Fitted:
    set_seed(config.seed)
    lengths = [len(example.input_ids) for example in examples]
    budget = tokens_of_pass(lengths, config)
    if config.batch_size is not None:
        passes = passes_of(lengths, config.batch_size, budget=budget, world=ranks.world)
        plan = plan_examples(
            lengths, config.batch_size // (passes * ranks.world), epochs=config.epochs, seed=config.seed
        )
        config = replace(config, accumulate=passes, batch_size=None)
    else:
        plan = plan_batches(
            lengths,
            budget=budget,
            epochs=config.epochs,
            seed=config.seed,
            padded=base.shape.encoder_decoder,
        )
    steps = count_steps(plan, config, ranks)
    attached = attach(base, config, steps)
    start_from(attached, base, config)
    if config.head:
        attached = with_head(attached, base, dataset, config)
    check_room(attached, base, max(lengths))
    model = _trained(attached, base, config)
    parameters = sum(value.numel() for value in trainable_state(model).values())
    planned = plan[: steps * config.accumulate * ranks.world]
    progress(Stage("measuring what a step takes"))
    estimate, recomputed = settle(model, examples, planned, config)
    progress(Stage(f"{parameters:,} parameters to train, {steps} steps, {estimate}"))
    if recomputed:
        progress(Stage("activations are recomputed in the backward pass, to save memory"))
    set_seed(config.seed)
    loop = Loop(
        model,
        config,
        work=workspace.folder,
        examples=examples,
        held_out=held_out,
        plan=plan,
        progress=progress,
        ranks=ranks,
    )
    checkpoint = last_checkpoint(workspace.folder) if config.resume else None
    done = step_of(checkpoint) if checkpoint else 0
    over = early_stop(history(workspace.folder), len(held_out), config.patience) if checkpoint else None
    if checkpoint and (over or done >= steps):  # killed after its last step
        restore(model, best_checkpoint(checkpoint))
        fsdp.hold(model)
        return _Fitted(model, held_out, parameters, done, 0.0, 0.0, over or "done")
    loop.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    fsdp.hold(model)
    watch = loop.watch
    return _Fitted(model, held_out, parameters, loop.state.global_step, watch.speed, watch.busy, watch.stopped)


def _choose(
    base: LoadedBase, dataset: Dataset, held_out: Dataset, config: TrainConfig, progress: Progress
) -> _Fitted:
    start = time.monotonic()
    model = _trained(Attached(base.model, lambda _: None), base, config)
    template = choose(model, base, dataset, config, progress)
    seconds = time.monotonic() - start
    encoded = encode_with(template, held_out.examples, base.tokenizer, base.shape.context)
    if encoded is None:
        raise DataError("The chosen prompt leaves no room for the longest held-out example.", field="max_length")
    saved = Attached(base.model, lambda folder: write_template(template, folder, base.shape.hub_id))
    return _Fitted(_trained(saved, base, config), encoded, 0, 0, 0.0, seconds, "done")


def _before(
    workspace: Workspace,
    base: LoadedBase,
    dataset: Dataset,
    held_out: Sequence[Encoded],
    config: TrainConfig,
    progress: Progress,
    ranks: Ranks,
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
    plain = _trained(attached, base, config)
    loss = measure(plain, held_out, config.batch_tokens, progress).loss
    answers = _model_answers(plain, held_out, base, config, progress)
    if not ranks.first:
        return Evaluation(loss, None, [])
    if answers is None:
        some = asked(held_out, config.metric_examples)
        spec = BaseSpec(config.model, device=config.device)
        answers = served_answers(spec, None, some, max_new_tokens=config.max_new_tokens, progress=progress)
    before = Evaluation(loss, mark(answers, held_out), answers)
    samples = [(sample.prompt, sample.expected, sample.generated) for sample in before.samples]
    partial = stored.with_suffix(".partial")
    partial.write_text(json.dumps({"loss": before.loss, "samples": samples}))
    partial.replace(stored)
    return before
