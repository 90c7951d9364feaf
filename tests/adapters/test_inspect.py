"""`onebase adapters inspect` on folders that PEFT wrote: how each is served, or why it is not."""

from collections.abc import Callable
from pathlib import Path

import peft
import pytest

from onebase.cli.adapters import inspect_command
from onebase_adapters.errors import AdapterFormatError
from support.methods import CONFIGS, save_method, save_named


@pytest.mark.skipif("hira" not in CONFIGS, reason="this PEFT has no HiRA")
def test_how_it_is_served(
    tiny_model: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tiny_model("llama")
    inspect_command(save_named(tmp_path / "tokens", base, "trainable-tokens"), model=str(base))
    inspect_command(save_named(tmp_path / "hira", base, "hira"), model=str(base))
    tokens, hira = capsys.readouterr().out.split("HIRA", 1)
    assert "LowRank x 2" in tokens  # the embedding, and the head that is tied to it
    assert "LowRank x 6" in hira
    assert "HIRA as LowRank up to rank 64, relative error" in hira


def test_why_it_is_not(
    tiny_model: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tiny_model("llama")
    psoft = peft.PsoftConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    with pytest.raises(AdapterFormatError, match="It rotates the singular vectors") as refusal:
        inspect_command(save_method(tmp_path / "psoft", base, psoft), model=str(base))
    assert refusal.value.field == "peft_type"
    folder = save_method(tmp_path / "tasks", base, CONFIGS["multitask-prompt-tuning"]())
    with pytest.raises(AdapterFormatError, match="holds 3 tasks") as refusal:
        inspect_command(folder, model=str(base))
    assert refusal.value.field == "task"
    assert "MULTITASK_PROMPT_TUNING" in capsys.readouterr().out
