"""Two processes, as torchrun starts them: the result is that of one process."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ANIMALS = ("cat", "dog", "cow", "owl")


@pytest.fixture
def options(tmp_path: Path, tiny_model: Callable[[str], Path]) -> list[str]:
    data = tmp_path / "data.jsonl"
    rows = [
        {"prompt": f"{index} {ANIMALS[index % 4]} =", "completion": f" {ANIMALS[index % 4]}"} for index in range(44)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = str(tiny_model("llama"))
    options = ["--data", str(data), "--model", model, "--rank", "4", "--batch-tokens", "96", "--epochs", "2"]
    return [*options, "--metric-examples", "2", "--device", "cpu", "--learning-rate", "0.01"]


def run(launcher: list[str], output: Path, options: list[str], **environment: str) -> dict[str, torch.Tensor]:
    """Train in processes of its own; gives the adapter's tensors."""
    code = output.with_suffix(".py")
    code.write_text("from onebase_adapters.cli import main\nmain()\n")
    command = [sys.executable, *launcher, str(code), "train", "--output", str(output), *options]
    paths = ":".join(sys.path)
    done = subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("Wrote") == 1
    assert sorted(path.name for path in output.parent.glob(f"*{output.name}*")) == sorted([output.name, code.name])
    return load_file(output / "adapter_model.safetensors")


TORCHRUN = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
SPREAD = pytest.param(
    "zero2,zero3", marks=pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs onebase[deepspeed]")
)


@pytest.mark.parametrize("stages", ["none,fsdp", SPREAD])
def test_two_processes_train_the_adapter_that_one_trains(stages: str, tmp_path: Path, options: list[str]) -> None:
    alone = run([], tmp_path / "alone", [*options, "--accumulate", "2"])
    for stage in stages.split(","):
        extra = {"none": [], "fsdp": ["--fsdp"]}.get(stage, ["--deepspeed", stage])
        together = run(TORCHRUN, tmp_path / stage, [*options, *extra], DS_ACCELERATOR="cpu")
        assert together.keys() == alone.keys()
        for name, value in together.items():
            # Sums in another order, and Adam divides small gradients by their own size.
            assert (value - alone[name]).norm() < 0.05 * alone[name].norm(), name
