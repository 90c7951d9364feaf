"""Two processes, started by torchrun or with DeepSpeed's stages: the result is that of one process."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from onebase_adapters.errors import ConfigError
from onebase_contract.events import Evaluated, Event, silent
from onebase_contract.settings import TrainConfig
from onebase_training import training_run
from onebase_training.fitting import spread as spread_module
from onebase_training.fitting.distributed import Ranks
from onebase_training.fitting.extension_locks import extensions
from onebase_training.training_run import train
from support.processes import run_two

ANIMALS = ("cat", "dog", "cow", "owl")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[[str], Path]) -> TrainConfig:
    data = tmp_path_factory.mktemp("data") / "data.jsonl"
    rows = [
        {"prompt": f"{index} {ANIMALS[index % 4]} =", "completion": f" {ANIMALS[index % 4]}"} for index in range(44)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return TrainConfig(
        data=data,
        output=tmp_path_factory.mktemp("alone") / "out",
        model=str(tiny_model("llama")),
        rank=4,
        batch_tokens=96,
        epochs=2,
        eval_every=2,
        metric_examples=2,
        learning_rate=0.01,
        device="cpu",
    )


@pytest.fixture(scope="module")
def alone(config: TrainConfig) -> dict[str, torch.Tensor]:
    """The adapter's tensors, of one process that makes as large steps as two."""
    train(replace(config, accumulate=2), silent)
    return load_file(config.output / "adapter_model.safetensors")


@pytest.fixture
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS"):
        monkeypatch.setenv(name, "1")


def check_same(output: Path, alone: dict[str, torch.Tensor]) -> None:
    together = load_file(output / "adapter_model.safetensors")
    assert together.keys() == alone.keys()
    for name, value in together.items():
        # Sums in another order, and Adam divides small gradients by their own size.
        assert (value - alone[name]).norm() < 0.05 * alone[name].norm(), name


@pytest.mark.usefixtures("one_thread")
def test_torchrun_trains_the_adapter_that_one_process_trains(
    config: TrainConfig, alone: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    code, output = tmp_path / "run.py", tmp_path / "out"
    code.write_text("from onebase.cli.main import main\nmain()\n")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=2",
        "--standalone",
        str(code),
        "train",
    ]
    command += ["--output", str(output), "--data", str(config.data), "--model", config.model, "--rank", "4"]
    command += [
        "--batch-tokens",
        "96",
        "--epochs",
        "2",
        "--eval-every",
        "2",
        "--metric-examples",
        "2",
        "--device",
        "cpu",
    ]
    command += ["--learning-rate", "0.01"]
    environment = os.environ | {"PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("Wrote") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run.py"]
    check_same(output, alone)


def train_by_deepspeed(config: TrainConfig, killed_at: int | None = None) -> None:
    """One of some processes; the first dies at `killed_at`, before that step's checkpoint."""
    os.environ["DS_ACCELERATOR"] = "cpu"

    def progress(event: Event) -> None:
        if isinstance(event, Evaluated) and event.step == killed_at:
            os._exit(9)

    train(config, progress)


def test_what_a_killed_compilation_left_is_forgotten_unless_another_run_compiles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / "py311_cpu" / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    with extensions():
        assert not lock.exists()
        lock.touch()
        with extensions():
            assert lock.exists()


needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs onebase[deepspeed]")


@needs_deepspeed
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_deepspeed_trains_the_adapter_that_one_process_trains(
    stage: str, config: TrainConfig, alone: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    spread = replace(config, output=tmp_path / "out", deepspeed=stage)
    assert run_two(train_by_deepspeed, spread, 4, until_first=True)[0] == 9
    assert not spread.output.exists()
    assert run_two(train_by_deepspeed, replace(spread, resume=True)) == [0, 0]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    check_same(spread.output, alone)


@pytest.mark.parametrize("spread", [{"fsdp": True}, {"deepspeed": "zero2"}])
def test_processes_are_torchruns_to_start(spread: dict[str, Any], config: TrainConfig) -> None:
    with pytest.raises(ConfigError, match="torchrun"):
        train(replace(config, **spread), silent)


@pytest.mark.parametrize("spread", [{"fsdp": True}, {"deepspeed": "zero2"}])
def test_what_prunes_between_steps_is_not_spread(
    spread: dict[str, Any], config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_run, "this_process", lambda: Ranks(0, 2, launched=True))
    monkeypatch.setattr(spread_module, "meet", lambda *_, **__: None)
    with pytest.raises(ConfigError, match="without " + next(iter(spread))):
        train(replace(config, method="adalora", output=tmp_path / "out", epochs=4, **spread), silent)
