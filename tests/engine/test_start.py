"""What a start does not do: import what serving never uses."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

_SERVE = """
import sys
from onebase_engine.kernels.lean_imports import stay_alone
stay_alone()
from onebase_engine.kernels.cpu.build import Build  # as the worker does, before all else
from support.engines import Driver, engine_config
from onebase_engine.engine import Engine
from onebase_engine.startup import start_engine
from pathlib import Path
from onebase_engine.request import EngineRequest, SamplingParams
engine = start_engine(engine_config(Path(sys.argv[1])), progress=lambda _: None)
engine.submit(EngineRequest("a", (5, 9, 300), SamplingParams(temperature=1.0, max_tokens=4)))
while engine.busy:
    engine.step()
heavy = {"torch._dynamo", "torch.distributed.tensor", "torch._inductor", "peft"}
print(*heavy & sys.modules.keys())
import torch
assert torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1)) == 2
"""


def test_the_engine_imports_neither_torchs_compiler_nor_peft(llama: Path) -> None:
    """And the compiler is as it was for who asks for it later."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    run = subprocess.run([sys.executable, "-c", _SERVE, llama], capture_output=True, text=True, env=environment)
    assert (run.returncode, run.stdout.strip()) == (0, ""), run.stderr


@pytest.mark.parametrize("line", ["--help", "serve --help", "serve --nosuch", "train --help", "train --nosuch"])
def test_help_and_typos_cost_no_torch(line: str) -> None:
    ask = f"""
import sys
sys.argv = ["onebase", *{line.split()}]
from onebase.cli.main import main
try:
    main()
finally:
    print("torch" in sys.modules, "transformers" in sys.modules, "numba" in sys.modules)
"""
    run = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True)
    assert run.returncode == (2 if "nosuch" in line else 0), run.stderr
    assert run.stdout.splitlines()[-1] == "False False False"
