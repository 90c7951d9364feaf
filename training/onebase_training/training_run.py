"""One training run, from a configuration to an adapter's folder. The command line, the demo and jobs all call this.

On disk there is either the finished folder, or a hidden work folder beside it with whole checkpoints, or nothing.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from transformers import set_seed

from onebase_adapters.atomic_files import staged_directory
from onebase_adapters.errors import AdapterError, ConfigError, DataError
from onebase_contract.events import Progress, Stage, silent
from onebase_contract.run_folder import Workspace, open_workspace
from onebase_contract.settings import TrainConfig
from onebase_engine.kernels.device import peak_memory
from onebase_training.data import Encoded
from onebase_training.data.encoding.encode_template import encode_with
from onebase_training.evaluation import served
from onebase_training.evaluation.answers import model_answers, served_answers
from onebase_training.evaluation.evaluation_result import Evaluation, Sample, asked, mark
from onebase_training.evaluation.held_out_loss import classify, measure
from onebase_training.fitting import fsdp
from onebase_training.fitting.checkpoints import history, last_checkpoint
from onebase_training.fitting.distributed import (
    Ranks,
    barrier,
    gathered,
    take_own_gpu,
    this_process,
)
from onebase_training.fitting.early_stopping import Stopped
from onebase_training.fitting.estimate import settle
from onebase_training.fitting.training_loop import Loop
from onebase_training.methods.attach import Attach, start_from
from onebase_training.methods.classification_head import with_head
from onebase_training.methods.hard_prompt import choose, write_template
from onebase_training.model.attached import Attached
from onebase_training.model.trained_model import Trained, trainable_state
from onebase_training.result_folder import versions, write_adapter, write_marks
from onebase_training.run_plan import RunPlan, check_room, make_plan
from onebase_training.run_result import TrainResult

_BEFORE_FILE = "before.json"


def train(config: TrainConfig, progress: Progress = silent, *, before: Evaluation | None = None) -> TrainResult:
    """Train and write `config.output`. `before`: the base's own marks on this very data, where they are known.

    Raises ConfigError, DataError, BaseModelError or StorageError; nothing half-written is left behind.
    """
    ranks = this_process()
    if config.spread and not ranks.launched:
        field = "fsdp" if config.fsdp else "deepspeed"
        raise ConfigError(
            f"{field} spreads a run over processes: torchrun --nproc-per-node N starts them (1 for one GPU with "
            "offload).",
            field=field,
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
    unfinished = workspace.notes()["settings"] if config.resume else None
    plan = make_plan(config, progress, ranks, unfinished=unfinished)
    if ranks.first:
        workspace.begin(plan.config, data=plan.digests, base=plan.base.shape.fingerprint)
    if before is None:
        before = _before(plan, workspace, progress, ranks)
    if plan.method.attach is None:
        fitted = _choose(plan, progress)
    else:
        fitted = _fit(plan, plan.method.attach, workspace, progress, ranks)

    progress(Stage("measuring the result"))
    model = fitted.model
    loss = measure(model, fitted.held_out, plan.config.batch_tokens, progress).loss
    fsdp.reshard(model)
    result = TrainResult(
        output=workspace.output,
        before=before,
        after=Evaluation(loss, None, []),
        steps=fitted.steps,
        parameters=fitted.parameters,
        tokens_per_second=fitted.tokens_per_second,
        seconds=fitted.seconds,
        peak_memory=peak_memory(plan.base.device),
        stopped=fitted.stopped,
        notes={**plan.notes(), "versions": versions(), **model.attached.notes},
        history=history(workspace.folder),
        lengths=[len(example.input_ids) for example in plan.examples],
    )
    answers = _labels(plan, model, fitted.held_out)
    with gathered(model), fsdp.whole(model):
        if ranks.first:
            with staged_directory(workspace.output) as folder:
                write_adapter(folder, model.attached.save, result.notes)
                if answers is None:
                    answers = _answers_of(plan, folder, fitted, ranks, progress)
                result = replace(result, after=Evaluation(loss, mark(answers, fitted.held_out), answers))
                write_marks(folder, result, plan.base.shape.hub_id)
    barrier()
    return result


def _labels(plan: RunPlan, model: Trained, examples: Sequence[Encoded]) -> list[Sample] | None:
    """Return what a classifier answers; None: the serving code is to answer. All processes must call."""
    config = plan.config
    if not config.metric_examples:
        return []
    if model.attached.head is None:
        return None
    return classify(model, examples, plan.base.tokenizer, config.batch_tokens)


def _answers_of(plan: RunPlan, folder: Path, fitted: "_Fitted", ranks: Ranks, progress: Progress) -> list[Sample]:
    """Return the answers that users of the written folder will get."""
    config = plan.config
    some, limit = asked(fitted.held_out, config.metric_examples), config.max_new_tokens
    whole = config.method == "full"
    spec = replace(plan.served, model=str(folder)) if whole else plan.served
    adapter = None if whole or plan.method.attach is None else folder
    try:
        return served_answers(spec, adapter, some, max_new_tokens=limit, progress=progress)
    except AdapterError as error:
        if ranks.world > 1:
            progress(Stage(f"no metric, since this adapter is not served: {error}"))
            return []
        progress(Stage(f"answers by transformers, since this adapter is not served: {error}"))
        tokenizer = plan.base.tokenizer
        return model_answers(fitted.model, some, tokenizer, max_new_tokens=limit, progress=progress)


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


def _fit(plan: RunPlan, attach: Attach, workspace: Workspace, progress: Progress, ranks: Ranks) -> _Fitted:
    config, base, examples, batches = plan.config, plan.base, plan.examples, plan.batches
    set_seed(config.seed)
    attached = attach(base, config, batches.steps)
    start_from(attached, base, config)
    if config.head:
        attached = with_head(attached, base, plan.dataset, config)
    check_room(attached, base, max(len(example.input_ids) for example in examples))
    model = plan.trained(attached)
    parameters = sum(value.numel() for value in trainable_state(model).values())
    progress(Stage("measuring what a step takes"))
    estimate, recomputed = settle(model, examples, batches.plan, config)
    progress(Stage(f"{parameters:,} parameters to train, {batches.steps} steps, {estimate}"))
    if recomputed:
        progress(Stage("activations are recomputed in the backward pass, to save memory"))
    set_seed(config.seed)
    loop = Loop(
        model,
        config,
        work=workspace.folder,
        examples=examples,
        held_out=plan.evaluation,
        batches=batches,
        progress=progress,
        ranks=ranks,
    )
    loop.train(last_checkpoint(workspace.folder) if config.resume else None)
    fsdp.hold(model)
    pace = loop.pace
    return _Fitted(model, plan.evaluation, parameters, loop.state.step, pace.speed, pace.seconds, loop.stopped)


def _choose(plan: RunPlan, progress: Progress) -> _Fitted:
    base, config = plan.base, plan.config
    start, limit = time.monotonic(), min(config.max_length, base.shape.context)
    with served.serving(plan.served, limit, progress) as engine:
        loss = partial(served.loss, engine, adapted=False, progress=progress)
        template = choose(loss, plan.dataset, config, base.tokenizer, limit, progress)
    seconds = time.monotonic() - start
    encoded = encode_with(template, plan.held_out.examples, base.tokenizer, base.shape.context)
    if encoded is None:
        raise DataError("The chosen prompt leaves no room for the longest held-out example.", field="max_length")
    saved = Attached(base.model, lambda folder: write_template(template, folder, base.shape.hub_id))
    return _Fitted(plan.trained(saved), encoded, 0, 0, 0.0, seconds, "done")


def _before(plan: RunPlan, workspace: Workspace, progress: Progress, ranks: Ranks) -> Evaluation:
    """The base's own marks (with a head: an untrained one's), measured once, however often a run is resumed."""
    config, held_out = plan.config, plan.evaluation
    stored = workspace.folder / _BEFORE_FILE
    if config.resume and stored.exists():
        saved = json.loads(stored.read_text())
        known = [Sample(*sample) for sample in saved["samples"]]
        return Evaluation(saved["loss"], mark(known, held_out), known)
    progress(Stage("measuring the base"))
    attached = Attached(plan.base.model, lambda _: None)
    if config.head:
        set_seed(config.seed)
        attached = with_head(attached, plan.base, plan.dataset, config)
    plain = plan.trained(attached)
    loss = measure(plain, held_out, config.batch_tokens, progress).loss
    answers = _labels(plan, plain, held_out)
    if not ranks.first:
        return Evaluation(loss, None, [])
    if answers is None:
        some, limit = asked(held_out, config.metric_examples), config.max_new_tokens
        answers = served_answers(plan.served, None, some, max_new_tokens=limit, progress=progress)
    before = Evaluation(loss, mark(answers, held_out), answers)
    samples = [(sample.prompt, sample.expected, sample.generated) for sample in before.samples]
    partial = stored.with_suffix(".partial")
    partial.write_text(json.dumps({"loss": before.loss, "samples": samples}))
    partial.replace(stored)
    return before
