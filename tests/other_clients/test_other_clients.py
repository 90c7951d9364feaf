"""Clients that others wrote, where `make clients` has installed them: each drives a server, as there."""

import shutil
import sys
from pathlib import Path

import pytest

from support.fake_server import run_beside

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
PYTHON = Path(sys.prefix) / "clients" / "bin" / "python"


@pytest.mark.skipif(not PYTHON.with_name("lm_eval").exists(), reason="not installed: make clients")
@pytest.mark.parametrize(
    "script", ["with_litellm.py", "with_langchain.py", "with_lm_eval.py", "with_pydantic_ai.py"]
)
def test_python_clients(script: str) -> None:
    assert run_beside([str(PYTHON), str(HERE / script)]) == 0


@pytest.mark.skipif(
    not (shutil.which("node") and (HERE / "node_modules" / "ai").is_dir()), reason="not installed: make clients"
)
@pytest.mark.parametrize("script", ["with_node.mjs", "with_ai_sdk.mjs"])
def test_node_clients(script: str) -> None:
    assert run_beside(["node", str(HERE / script)]) == 0
