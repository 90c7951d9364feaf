"""Sharding by `fully_shard`, in two processes: parts are halves, and a killed run goes on to the same result."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from onebase_adapters.errors import ConfigError
from onebase_contract.events import Evaluated, Event
from onebase_contract.settings import TrainConfig
from onebase_training.fitting import fsdp
from onebase_training.fitting.training_loop import Loop
from onebase_training.training_run import train
from support.processes import run_two


def train_a_part(config: TrainConfig, killed_at: int | None) -> None:
    """One of two processes."""

    def progress(event: Event) -> None:
        if isinstance(event, Evaluated) and event.step == killed_at:
            os._exit(9)

    usual = Loop.train

    def checked(loop: Loop, checkpoint: Path | None) -> None:
        check_parts(loop)
        usual(loop, checkpoint)

    Loop.train = checked
    train(config, progress)


def check_parts(loop: Loop) -> None:
    """Each process holds half of every parameter, and `whole` is all of it."""
    model = loop.model
    parts = {name: value for name, value in model.named_parameters() if value.requires_grad}
    assert parts and all(value.to_local().numel() * 2 == value.numel() for value in parts.values())
    frozen = [value for value in model.parameters() if not value.requires_grad]
    assert sum(value.to_local().numel() for value in frozen) <= 0.51 * sum(value.numel() for value in frozen)
    with fsdp.whole(model):
        whole = {name: value for name, value in model.named_parameters() if value.requires_grad}
        assert all(type(value) is torch.nn.Parameter for value in whole.values())
    for name, value in parts.items():
        fsdp.put(value.detach(), whole[name].detach() + 0)
        assert torch.equal(value.detach().full_tensor(), whole[name])


def run(config: TrainConfig, killed_at: int | None = None) -> list[int | None]:
    """Train in two processes; gives their exit codes."""
    return run_two(train_a_part, config, killed_at, until_first=killed_at is not None)


@pytest.fixture
def config(tmp_path: Path, tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> TrainConfig:
    for name in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS"):
        monkeypatch.setenv(name, "1")
    data = tmp_path / "data.jsonl"
    rows = [{"prompt": f"{index} + 1 =", "completion": f" {index + 1}"} for index in range(100)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = str(tiny_model("llama"))
    return TrainConfig(
        data=data,
        output=tmp_path / "out",
        model=model,
        rank=4,
        batch_tokens=96,
        max_steps=6,
        eval_every=2,
        metric_examples=2,
        learning_rate=0.01,
        device="cpu",
    )


def test_a_run_in_parts_goes_on_after_a_kill(config: TrainConfig, tmp_path: Path) -> None:
    train(replace(config, accumulate=2, output=tmp_path / "alone"))
    spread = replace(config, fsdp=True)
    # The first process ends at step 4, before its checkpoint; the other one then waits for it and is killed, too.
    assert run(spread, killed_at=4)[0] == 9
    assert not spread.output.exists()
    assert run(replace(spread, resume=True)) == [0, 0]
    expected = load_file(tmp_path / "alone" / "adapter_model.safetensors")
    found = load_file(spread.output / "adapter_model.safetensors")
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert (value - expected[name]).norm() < 0.05 * expected[name].norm(), name


def test_what_cannot_be_spread_is_refused(config: TrainConfig) -> None:
    with pytest.raises(ConfigError, match="choose one"):
        replace(config, fsdp=True, deepspeed="zero2")
