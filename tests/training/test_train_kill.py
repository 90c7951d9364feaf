"""kill -9 at ten random moments, some of them while a checkpoint is written: the result is an undisturbed run's."""

import json
import multiprocessing
import random
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from safetensors.torch import load_file

from onebase_contract.events import Evaluated, Event, Stage, Step
from onebase_contract.run_folder import Workspace
from onebase_contract.settings import TrainConfig
from onebase_training.training_run import train

EVERY = 2
"""Steps between checkpoints."""
STEPS = 24

Moment = tuple[Callable[[Event], bool], bool]
"""When to kill, and whether to wait for a checkpoint's folder to be begun."""


def train_or_resume(config: TrainConfig, pipe: Connection) -> None:
    """In a process of its own."""
    train(replace(config, resume=Workspace.of(config).folder.exists()), pipe.send)


def run_until(moment: Moment | None, config: TrainConfig, rng: random.Random) -> None:
    """Run, and kill once an event is the moment's; without a moment, to the end."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["onebase_training.training_run"])
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=train_or_resume, args=(config, theirs))
    process.start()
    theirs.close()
    try:
        while True:
            event = ours.recv()
            if moment is None or not moment[0](event):
                continue
            if moment[1]:
                partial = Workspace.of(config).folder / f".checkpoint-{event.step}.partial"
                while not partial.exists():
                    time.sleep(0.0002)
            time.sleep(rng.uniform(0, 0.01))
            process.kill()
            process.join(60)
            assert process.exitcode == -9
            return
    except EOFError:
        process.join(60)
        assert moment is None and process.exitcode == 0
    finally:
        process.kill()
        ours.close()


def moments(rng: random.Random) -> list[Moment]:
    """Ten in the order of a run: at the start, in steps, in checkpoints' writing, at the end."""

    def said(text: str) -> Callable[[Event], bool]:
        return lambda event: isinstance(event, Stage) and text in event.text

    def reached(step: int, kind: type[Step] | type[Evaluated]) -> Callable[[Event], bool]:
        return lambda event: isinstance(event, kind) and event.step >= step

    found: list[Moment] = [(said("measuring the base"), False)]
    for at, step in enumerate(sorted(rng.sample(range(2, STEPS - EVERY), 8))):
        found.append((reached(step, Evaluated if at % 2 else Step), bool(at % 2)))
    return [*found, (said("measuring the result"), False)]


def test_ten_kills_lose_nothing(
    tmp_path: Path, tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS"):
        monkeypatch.setenv(name, "1")  # of the processes: their matrices are tiny
    data = tmp_path / "data.jsonl"
    rows = [{"prompt": f"{index} + 1 =", "completion": f" {index + 1}"} for index in range(200)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = TrainConfig(
        data=data,
        output=tmp_path / "undisturbed",
        model=str(tiny_model("llama")),
        rank=4,
        dropout=0.1,
        batch_tokens=128,
        max_steps=STEPS,
        epochs=20,
        eval_every=EVERY,
        patience=0,
        metric_examples=2,
        device="cpu",
    )
    rng = random.Random(0)
    run_until(None, config, rng)
    killed = replace(config, output=tmp_path / "killed")
    torn = 0
    for moment in moments(rng):
        run_until(moment, killed, rng)
        assert not killed.output.exists()
        torn += bool(list(Workspace.of(killed).folder.glob(".checkpoint-*.partial")))
    assert torn > 0, "no kill came while a checkpoint was written"
    run_until(None, killed, rng)
    expected = load_file(config.output / "adapter_model.safetensors")
    found = load_file(killed.output / "adapter_model.safetensors")
    assert found.keys() == expected.keys()
    assert all(bool((value == expected[name]).all()) for name, value in found.items())
    histories = [json.loads((one.output / "metrics.json").read_text())["history"] for one in (config, killed)]
    assert [row["step"] for row in histories[1]] == [row["step"] for row in histories[0]]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.jsonl", "killed", "undisturbed"]
