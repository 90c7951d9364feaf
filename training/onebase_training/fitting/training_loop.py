"""The loop: a plan's batches through the model, an optimiser's steps, evaluations and checkpoints.

The invariant: a checkpoint is whole or not there, and holds all that the next step depends on, so a run that is
killed and resumed ends with the very numbers of one that is not. A step's loss is summed over its batches, and
divided by its number of labels.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from onebase_adapters.errors import ConfigError
from onebase_contract.events import Evaluated, Progress, Step
from onebase_contract.settings import TrainConfig
from onebase_training.data import Encoded
from onebase_training.data.encoding.packing import Batches
from onebase_training.data.task_kind import default_metric
from onebase_training.evaluation.held_out_loss import measure
from onebase_training.fitting import fsdp
from onebase_training.fitting.checkpoints import (
    RunState,
    checkpoint_of,
    keep_only,
    read_state,
    restore,
    save_trained,
    staged_checkpoint,
    write_state,
)
from onebase_training.fitting.distributed import ALONE, Ranks, total
from onebase_training.fitting.early_stopping import Stopped, best_evaluation, early_stop
from onebase_training.fitting.optimizer import make_schedule
from onebase_training.fitting.spread import spread
from onebase_training.model.trained_model import Trained

_SCHEDULE_FILE = "scheduler.pt"
_EVALUATIONS = 8
"""Evaluations in a run, unless the settings say otherwise."""


@dataclass
class Pace:
    """Tokens and seconds since the loop began or went on; evaluations are left out."""

    tokens: int = 0
    seconds: float = 0.0

    @property
    def speed(self) -> float:
        """Tokens a second."""
        return self.tokens / self.seconds if self.seconds else 0.0


class Loop:
    """One run over `batches`, whose rows are indices of `examples`; its checkpoints lie in `work`."""

    def __init__(
        self,
        model: Trained,
        config: TrainConfig,
        *,
        work: Path,
        examples: Sequence[Encoded],
        held_out: Sequence[Encoded],
        batches: Batches,
        progress: Progress,
        ranks: Ranks = ALONE,
    ) -> None:
        self.model = model
        self.state = RunState()
        self.pace = Pace()
        self.stopped: Stopped = "done"
        self._config = config
        self._work = work
        self._examples = examples
        self._held_out = held_out
        self._batches = batches
        self._progress = progress
        self._ranks = ranks
        self._tokens = [sum(model.length(examples[index]) for index in batch) for batch in batches.plan]
        self._evaluate_every = config.eval_every or max(1, -(-batches.steps // _EVALUATIONS))
        self._classifies = default_metric([one.example for one in held_out]) == "accuracy"
        self._spread = spread(model, config, ranks)
        self._schedule = make_schedule(self._spread.optimizer, config, batches.steps)

    def train(self, checkpoint: Path | None = None) -> None:
        """Train, from `checkpoint` on if one is given, and leave the model as it was at its best evaluation.

        Raises ConfigError if the loss is no number any more, StorageError if a checkpoint cannot be written.
        """
        if checkpoint is not None:
            self._go_on_from(checkpoint)
        while self.state.step < self._batches.steps and self.stopped == "done":
            self._step()
            self._look_at_the_clock()
            if self._is_due():
                self._evaluate()
                self._save()
        restore(self.model, checkpoint_of(self._work, self.state.best_step))

    def _step(self) -> None:
        start = time.monotonic()
        model, step, attached = self.model, self.state.step, self.model.attached
        batches = [self._collated(batch) for batch in self._batches.of_step(step, self._ranks.rank)]
        labels = total(sum(batch["labels"].numel() for batch in batches), model.device)
        summed = torch.zeros((), device=model.device)

        def loss_of(batch: dict[str, torch.Tensor], module: nn.Module) -> torch.Tensor:
            # Gradients are averaged over the processes: what each adds to their sum is made so many times larger.
            loss: torch.Tensor = module(**batch) * self._ranks.world / labels
            return loss if attached.penalty is None else loss + attached.penalty() / len(batches)

        model.train()
        for number, batch in enumerate(batches, 1):
            summed += self._spread.backward(partial(loss_of, batch), last=number == len(batches))
        norm = self._spread.step()
        if attached.after_step is not None:
            attached.after_step(step + 1)
        rate = float(self._schedule.get_last_lr()[0])
        self._schedule.step()
        self._spread.optimizer.zero_grad()
        self.state.step += 1
        loss = total(float(summed), model.device) / self._ranks.world
        self.pace.seconds += time.monotonic() - start
        self.pace.tokens += sum(self._tokens[place] for place in self._batches.places_of_step(step))
        self._note(loss=loss, grad_norm=norm, learning_rate=rate)
        left = sum(self._tokens[self._batches.places_of_step(self.state.step).start :]) / self.pace.speed
        self._progress(Step(self.state.step, self._batches.steps, loss, rate, self.pace.speed, left))

    def _collated(self, batch: Sequence[int]) -> dict[str, torch.Tensor]:
        made = self.model.collate([self._examples[index] for index in batch])
        return {name: value.to(self.model.device) for name, value in made.items()}

    def _look_at_the_clock(self) -> None:
        """Stop if the run's time is over."""
        limit = self._config.time_limit
        over = limit is not None and self.pace.seconds >= limit
        if limit is not None and total(over, self.model.device):  # all end where the first one does
            self.stopped = "time limit"

    def _is_due(self) -> bool:
        """Whether the model is to be measured and kept now."""
        last = self.state.step == self._batches.steps
        return last or self.stopped != "done" or self.state.step % self._evaluate_every == 0

    def _evaluate(self) -> None:
        measured = measure(self.model, self._held_out, self._config.batch_tokens, self._progress)
        fsdp.reshard(self.model)
        accuracy = 1 - measured.wrong / len(self._held_out) if self._classifies else None
        self._note(eval_loss=measured.loss, **({} if accuracy is None else {"eval_accuracy": accuracy}))
        log = self.state.log
        best = best_evaluation(log, len(self._held_out)) == sum("eval_loss" in row for row in log) - 1
        if best:
            self.state.best_step = self.state.step
        self._progress(Evaluated(self.state.step, measured.loss, accuracy, best))
        self._look_for_a_stop()

    def _look_for_a_stop(self) -> None:
        reason = early_stop(self.state.log, len(self._held_out), self._config.patience)
        if reason is not None and self.state.step < self._batches.steps:
            self.stopped = reason

    def _note(self, **values: float) -> None:
        """Add a row to the log."""
        if not all(math.isfinite(value) for value in values.values()):
            raise ConfigError(
                f"Training diverged: the loss is no number at step {self.state.step}. Use a lower "
                f"--learning-rate (now {self._config.learning_rate:g}).",
                field="learning_rate",
            )
        self.state.log.append({"step": self.state.step, **values})

    def _save(self) -> None:
        """A checkpoint; then the older ones that are not the best go."""
        target = checkpoint_of(self._work, self.state.step)
        with staged_checkpoint(target, self._ranks) as scratch:
            save_trained(self.model, scratch, self._ranks)
            self._spread.save(scratch)
            torch.save(_random_state(self.model.device), scratch / f"random-{self._ranks.rank}.pt")
            if self._ranks.first:
                torch.save(self._schedule.state_dict(), scratch / _SCHEDULE_FILE)
                write_state(self.state, scratch)
        if self._ranks.first:
            keep_only(self._work, {target.name, checkpoint_of(self._work, self.state.best_step).name})

    def _go_on_from(self, checkpoint: Path) -> None:
        self.state = read_state(checkpoint)
        self._look_for_a_stop()
        restore(self.model, checkpoint)
        self._spread.load(checkpoint)
        self._schedule.load_state_dict(torch.load(checkpoint / _SCHEDULE_FILE, weights_only=True))
        random = torch.load(checkpoint / f"random-{self._ranks.rank}.pt", weights_only=True)
        _put_random_state(random, self.model.device)


def _random_state(device: torch.device) -> dict[str, Any]:
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def _put_random_state(state: dict[str, Any], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)
