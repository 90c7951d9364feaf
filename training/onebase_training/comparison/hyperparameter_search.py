"""A bounded search for settings, by the held-out loss: what falls behind at an evaluation is stopped.

Settings are proposed by optuna's TPE (Bergstra et al. 2011), runs are cut by successive halving (Jamieson and
Talwalkar 2016): of those that reach their 1st, 2nd, 4th, ... evaluation, the better half goes on.
"""

import math
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from onebase_adapters.errors import ConfigError
from onebase_contract.events import Evaluated, Event, Progress, Stage
from onebase_contract.settings import TrainConfig
from onebase_training.methods.attach import find_method
from onebase_training.run_result import TrainResult

Run = Callable[[TrainConfig, Progress], TrainResult]

_PROMPTED = ("prompt-tuning", "p-tuning", "prefix-tuning", "p-tuning-v2")


@dataclass(frozen=True)
class Tried:
    """One run of the search."""

    settings: Mapping[str, Any]
    loss: float
    """Best held-out loss that it reached, in nats; infinite where it diverged before the first."""
    finished: bool
    """Whether it ran to its end, or was cut."""


@dataclass(frozen=True)
class Tuned:
    """The result of the search."""

    tried: tuple[Tried, ...]
    """In order."""
    best: TrainConfig
    """The best of those that finished."""


def tune(config: TrainConfig, trials: int, run: Run, progress: Progress) -> Tuned:
    """Try `trials` settings of `config.method`. Raises ConfigError where optuna is missing, or nothing to tune."""
    try:
        import optuna
    except ImportError as error:
        raise ConfigError("optuna is not installed: pip install 'onebase[tune]'.", field="method") from error
    if trials < 1:
        raise ConfigError("A search needs one trial at least.", field="trials")
    if find_method(config.method).learning_rate is None:
        raise ConfigError(f"{config.method} has no settings to tune.", field="method")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    tried: list[Tried] = []

    def objective(trial: Any) -> float:
        settings = _suggest(trial, config)
        named = ", ".join(f"{name} {value:.3g}" for name, value in settings.items())
        progress(Stage(f"trial {trial.number + 1} of {trials}: {named}"))
        losses: list[float] = []

        def watch(event: Event) -> None:
            if not isinstance(event, Evaluated):
                return
            losses.append(event.loss)
            progress(Stage(f"  step {event.step}: held-out loss {event.loss:.4f}"))
            trial.report(event.loss, len(losses))
            if trial.should_prune():
                raise optuna.TrialPruned

        with tempfile.TemporaryDirectory() as scratch:
            one = replace(config, **settings, output=Path(scratch) / "trial", metric_examples=0, overwrite=False)
            try:
                run(one, watch)
            except optuna.TrialPruned:
                tried.append(Tried(settings, min(losses), finished=False))
                progress(Stage("  cut: others were better by then"))
                raise
            except ConfigError as error:
                if error.field != "learning_rate":
                    raise
                tried.append(Tried(settings, min(losses, default=math.inf), finished=False))
                progress(Stage("  cut: it diverged"))
                raise optuna.TrialPruned from error
        tried.append(Tried(settings, min(losses), finished=True))
        return min(losses)

    study = optuna.create_study(
        sampler=optuna.samplers.TPESampler(seed=config.seed),
        pruner=optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=2),
    )
    study.enqueue_trial(_defaults(config))
    study.optimize(objective, n_trials=trials)
    finished = [one for one in tried if one.finished]
    if not finished:
        raise ConfigError("Every trial diverged: begin with a lower --learning-rate.", field="learning_rate")
    best = min(finished, key=lambda one: one.loss)
    return Tuned(tuple(tried), replace(config, **dict(best.settings)))


def _defaults(config: TrainConfig) -> dict[str, float]:
    """The first trial: what training would have taken. It is never cut, for there is nothing to compare it with."""
    settings: dict[str, float] = {"learning_rate": _default_rate(config)}
    if (rank := find_method(config.method).rank) is not None:
        settings["rank"] = config.rank or rank
    if config.method in _PROMPTED:
        settings["prompt_length"] = config.prompt_length
    if config.method == "bottleneck":
        settings["bottleneck"] = config.bottleneck
    return settings


def _suggest(trial: Any, config: TrainConfig) -> dict[str, Any]:
    """Learning rates within a factor of ten of the default, sizes on a logarithmic scale."""
    rate = _default_rate(config)
    settings: dict[str, Any] = {
        "learning_rate": trial.suggest_float("learning_rate", rate / 10, rate * 10, log=True)
    }
    if find_method(config.method).rank is not None:
        settings["rank"] = trial.suggest_int("rank", 2, 64, log=True)
    if config.method in _PROMPTED:
        settings["prompt_length"] = trial.suggest_int("prompt_length", 2, 128, log=True)
    if config.method == "bottleneck":
        settings["bottleneck"] = trial.suggest_int("bottleneck", 4, 256, log=True)
    return settings


def _default_rate(config: TrainConfig) -> float:
    return config.learning_rate or find_method(config.method).learning_rate or 0.0
