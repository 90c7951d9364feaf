"""The search: what it tries, what it cuts, what it takes."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from onebase_adapters.errors import ConfigError
from onebase_contract.events import Evaluated, Progress, silent
from onebase_contract.settings import TrainConfig
from onebase_training.comparison.hyperparameter_search import tune
from onebase_training.evaluation.evaluation_result import Evaluation
from onebase_training.run_result import TrainResult
from onebase_training.training_run import train

CONFIG = TrainConfig(data=Path("data"), output=Path("out"), learning_rate=1e-3)


def fake(config: TrainConfig, progress: Progress) -> TrainResult:
    """A run whose loss is best at a learning rate of 3e-3, and seen at each of eight evaluations."""
    assert config.learning_rate is not None
    loss = 1 + abs(config.learning_rate - 3e-3)
    for step in range(1, 9):
        progress(Evaluated(step, loss, None, best=True))
    marks = Evaluation(loss, None, [])
    return TrainResult(config.output, marks, marks, 8, 1, 1.0, 1.0, 1, "done", {}, [], [])


def test_the_best_of_those_that_finish_is_taken_and_the_worse_are_cut() -> None:
    found = tune(CONFIG, 25, fake, silent)
    assert len(found.tried) == 25
    assert found.tried[0].settings == {"learning_rate": 1e-3, "rank": 16}
    finished = [one for one in found.tried if one.finished]
    assert 0 < len(finished) < 20
    best = min(finished, key=lambda one: one.loss)
    assert found.best == replace(CONFIG, **best.settings)
    assert abs((found.best.learning_rate or 0) - 3e-3) < 1e-3
    assert tune(CONFIG, 25, fake, silent) == found


def test_each_kind_of_method_has_its_own_sizes() -> None:
    for method, size in (("prompt-tuning", "prompt_length"), ("bottleneck", "bottleneck"), ("ia3", None)):
        (one,) = tune(replace(CONFIG, method=method), 1, fake, silent).tried
        assert set(one.settings) == {"learning_rate", size} - {None}


def test_the_first_trial_has_the_methods_own_rank() -> None:
    for method, rank in (("qlora", 16), ("adalora", 8), ("loha", 8)):
        (one,) = tune(replace(CONFIG, method=method), 1, fake, silent).tried
        assert one.settings["rank"] == rank


def test_a_trial_that_diverges_does_not_end_the_search() -> None:
    def fragile(config: TrainConfig, progress: Progress) -> TrainResult:
        if (config.learning_rate or 0) > limit:
            raise ConfigError("Training diverged.", field="learning_rate")
        return fake(config, progress)

    limit = 2e-3
    found = tune(CONFIG, 12, fragile, silent)
    assert math.inf in {one.loss for one in found.tried}
    assert (found.best.learning_rate or 0) <= limit
    limit = 0.0
    with pytest.raises(ConfigError, match="Every trial diverged"):
        tune(CONFIG, 2, fragile, silent)


def test_what_cannot_be_tuned_is_refused() -> None:
    with pytest.raises(ConfigError, match="no settings"):
        tune(replace(CONFIG, method="hard-prompt"), 3, fake, silent)


def test_real_runs_leave_nothing_but_the_result(tmp_path: Path, tiny_model: Callable[[str], Path]) -> None:
    data = tmp_path / "data.jsonl"
    rows = [{"prompt": f"{index} =", "completion": f" {index % 2}"} for index in range(40)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = TrainConfig(
        data=data, output=tmp_path / "out", model=str(tiny_model("llama")), max_steps=4, device="cpu"
    )
    found = tune(replace(config, eval_every=1), 3, train, silent)
    assert len(found.tried) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.jsonl"]
