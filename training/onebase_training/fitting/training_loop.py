"""The loop: transformers' Trainer over packed rows, with checkpoints that are whole or not there.

What the Trainer keeps: optimiser, schedule, accumulation, clipping, best checkpoint, resuming, and accelerate's
devices and processes. What is ours: batches from a plan, a loss that is summed and divided by the step's number of
labels, checkpoints of the trained parameters alone.
"""

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from onebase_adapters.errors import ConfigError
from onebase_contract.events import Evaluated, Progress, Step
from onebase_contract.settings import TrainConfig
from onebase_training.data import Encoded
from onebase_training.data.task_kind import default_metric
from onebase_training.evaluation.held_out_loss import measure
from onebase_training.fitting import fsdp
from onebase_training.fitting.checkpoints import STATE_FILE, keep_only, restore, save_trained, staged_checkpoint
from onebase_training.fitting.distributed import ALONE, Ranks, deepspeed_settings
from onebase_training.fitting.early_stopping import Stopped, best_evaluation, early_stop
from onebase_training.methods.attach import find_method
from onebase_training.model.trained_model import Trained

Plan = list[list[int]]


class Loop(Trainer):  # type: ignore[misc]
    """One run over `plan`, whose batches are indices of `examples`."""

    def __init__(
        self,
        model: Trained,
        config: TrainConfig,
        *,
        work: Path,
        examples: Sequence[Encoded],
        held_out: Sequence[Encoded],
        plan: Plan,
        progress: Progress,
        ranks: Ranks = ALONE,
    ) -> None:
        self._ranks = ranks
        self._plan = plan
        self._progress = progress
        self._pass_tokens = config.batch_tokens
        self._head_rate = config.head_learning_rate
        self._classifies = default_metric([one.example for one in held_out]) == "accuracy"
        steps = count_steps(plan, config, ranks)
        tokens = [sum(model.length(examples[index]) for index in batch) for batch in plan]
        self.watch = Watch(config, ranks, progress, tokens, len(held_out))
        super().__init__(
            model=model,
            args=training_arguments(config, work, steps, model.device),
            data_collator=model.collate,
            train_dataset=examples,
            eval_dataset=held_out,
            callbacks=[self.watch, _AfterStep(model)],
        )
        self.loss_is_scaled_for_ga = True
        self._sharded = config.fsdp
        if config.fsdp:
            fsdp.shard(model, world=ranks.world, offload=config.offload)
            self.is_distributed_loading_by_transformers = True  # so that it is not wrapped once more
        for needless in (PrinterCallback, ProgressCallback):
            self.remove_callback(needless)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Of n processes, each takes every nth batch; a last round that is short begins the plan again."""
        world = self._ranks.world
        whole = self._plan + self._plan[: -len(self._plan) % world]
        return DataLoader(
            self.train_dataset, batch_sampler=whole[self._ranks.rank :: world], collate_fn=self.data_collator
        )

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """A classifier has a learning rate of its own."""
        fresh = self.optimizer is None
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        head = {id(value) for value in self.model.head.parameters()} if self.model.head and fresh else set()
        for group in list(optimizer.param_groups):
            own = [value for value in group["params"] if id(value) in head]
            if own:
                group["params"] = [value for value in group["params"] if id(value) not in head]
                optimizer.add_param_group({**group, "params": own, "lr": self._head_rate})
        return optimizer

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> torch.Tensor:
        own = torch.tensor(sum(batch["labels"].numel() for batch in batch_samples), device=device)
        return self.accelerator.reduce(own, "sum") if self._ranks.world > 1 else own

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        # Gradients are averaged over the processes: what each adds to their sum is made so many times larger.
        loss = model(**inputs) * self._ranks.world / num_items_in_batch
        penalty = self.model.attached.penalty
        return loss if penalty is None else loss + penalty() / self.args.gradient_accumulation_steps

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Called by the Trainer at its evaluation steps."""
        measured = measure(self.model, self.eval_dataset, self._pass_tokens, self._progress)
        fsdp.reshard(self.model)
        metrics = {"eval_loss": measured.loss}
        if self._classifies:
            metrics["eval_accuracy"] = 1 - measured.wrong / len(self.eval_dataset)
        self.log(metrics)
        log = self.state.log_history
        best = best_evaluation(log, len(self.eval_dataset)) == sum("eval_loss" in row for row in log) - 1
        if best:
            self.state.best_global_step = self.state.global_step
        self._progress(Evaluated(self.state.global_step, measured.loss, metrics.get("eval_accuracy"), best))
        self.control: TrainerControl = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    # Checkpoints

    def _determine_best_metric(self, metrics: Any, trial: Any) -> bool:
        return bool(self.state.best_global_step == self.state.global_step)  # as `evaluate` has found

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """A folder that appears whole; then the older ones that are not the best go."""
        work = Path(str(self.args.output_dir))
        if self.state.best_global_step:
            self.state.best_model_checkpoint = str(work / f"checkpoint-{self.state.best_global_step}")
        name = f"checkpoint-{self.state.global_step}"
        with staged_checkpoint(work / name, self._ranks) as scratch:
            save_trained(self.model, scratch, self._ranks)
            self._save_optimizer_and_scheduler(str(scratch))
            self._save_rng_state(str(scratch))
            if self._ranks.first:
                self.state.save_to_json(str(scratch / STATE_FILE))
        if self._ranks.first:
            keep_only(work, {name, Path(self.state.best_model_checkpoint or name).name})

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self._sharded:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        fsdp.save_optimizer(self.model, self.optimizer, Path(output_dir) / OPTIMIZER_NAME, first=self._ranks.first)
        if self._ranks.first:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not self._sharded or checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        fsdp.load_optimizer(self.model, self.optimizer, Path(checkpoint) / OPTIMIZER_NAME)
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        restore(self.model, Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        if self.state.best_model_checkpoint:
            restore(self.model, Path(self.state.best_model_checkpoint))


def count_steps(plan: Plan, config: TrainConfig, ranks: Ranks) -> int:
    """Optimiser steps of a whole run."""
    steps = -(-len(plan) // (config.accumulate * ranks.world))
    return min(steps, config.max_steps or steps)


def evaluation_interval(steps: int, config: TrainConfig) -> int:
    """Steps between evaluations."""
    return config.eval_every or max(1, -(-steps // 8))


def training_arguments(config: TrainConfig, work: Path, steps: int, device: torch.device) -> TrainingArguments:
    """Ours, in transformers' words."""
    interval = evaluation_interval(steps, config)
    return TrainingArguments(
        output_dir=str(work),
        max_steps=steps,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=config.accumulate,
        learning_rate=config.learning_rate or 0.0,
        lr_scheduler_type={"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}[
            config.schedule
        ],
        warmup_steps=round(config.warmup * steps),
        weight_decay=config.weight_decay,
        max_grad_norm=config.clip,
        optim=_optimizer(config, device),
        logging_nan_inf_filter=False,
        seed=config.seed,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=interval,
        save_strategy="steps",
        save_steps=interval,
        load_best_model_at_end=True,
        use_cpu=device.type == "cpu",
        disable_tqdm=True,
        report_to="none",
        remove_unused_columns=False,
        dataloader_pin_memory=device.type == "cuda",
        deepspeed=(
            None if config.deepspeed == "none" else deepspeed_settings(config.deepspeed, offload=config.offload)
        ),
        ddp_find_unused_parameters=False,
    )


def _optimizer(config: TrainConfig, device: torch.device) -> str:
    """On GPUs with a 4-bit base, one whose moments may move to the host (QLoRA, section 3: paged optimisers)."""
    paged = device.type == "cuda" and find_method(config.method).quantization != "none"
    return "paged_adamw_32bit" if paged and not config.spread else "adamw_torch_fused"


class Watch(TrainerCallback):  # type: ignore[misc]
    """Tells of progress, and ends a run early or at its time limit."""

    def __init__(
        self, config: TrainConfig, ranks: Ranks, progress: Progress, batch_tokens: Sequence[int], held_out: int
    ) -> None:
        self._config = config
        self._held_out = held_out
        """Examples."""
        self._batches = config.accumulate * ranks.world
        """Of a step."""
        self._progress = progress
        self._batch_tokens = batch_tokens
        self._tokens = 0
        self._since = 0.0
        self.busy = 0.0
        """Seconds spent in steps, evaluations left out."""
        self.stopped: Stopped = "done"

    @property
    def speed(self) -> float:
        """Tokens a second since training began or was resumed."""
        return self._tokens / self.busy if self.busy else 0.0

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._since = time.monotonic()

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.busy += time.monotonic() - self._since
        first = (state.global_step - 1) * self._batches
        self._tokens += sum(self._batch_tokens[first : first + self._batches])
        if state.global_step >= state.max_steps:
            control.should_evaluate = control.should_save = True
        elif self._config.time_limit is not None and self.busy >= self._config.time_limit:
            self.stopped = "time limit"
            control.should_evaluate = control.should_save = control.should_training_stop = True

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, **values: Any) -> None:
        logs = values.get("logs") or {}
        if not all(math.isfinite(logs.get(name, 0.0)) for name in ("loss", "eval_loss", "grad_norm")):
            raise ConfigError(
                f"Training diverged: the loss is no number at step {state.global_step}. Use a lower "
                f"--learning-rate (now {self._config.learning_rate:g}).",
                field="learning_rate",
            )
        if "loss" not in logs:
            return
        done, whole = state.global_step * self._batches, state.max_steps * self._batches
        left = sum(self._batch_tokens[done:whole]) / self.speed
        self._progress(
            Step(state.global_step, state.max_steps, logs["loss"], logs["learning_rate"], self.speed, left)
        )

    def on_evaluate(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        reason = early_stop(state.log_history, self._held_out, self._config.patience)
        if reason is not None and state.global_step < state.max_steps:
            self.stopped = reason
            control.should_save = control.should_training_stop = True


class _AfterStep(TrainerCallback):  # type: ignore[misc]
    """What a method does between steps."""

    def __init__(self, model: Trained) -> None:
        self._after_step = model.attached.after_step

    def on_optimizer_step(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self._after_step is not None:
            self._after_step(state.global_step + 1)
