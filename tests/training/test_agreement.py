"""`python -m benchmarks.agreement` on the tiny base: trainer and server say the same, and a server that has another
adapter does not."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.agreement import compare, on_two_bases, show, train_and_compare
from onebase_contract.settings import TrainConfig
from onebase_engine.base.gguf_file import convert_gguf
from support.quantised import save_gguf


@pytest.fixture
def config(tiny_model: Callable[[str], Path], tmp_path: Path) -> TrainConfig:
    data = tmp_path / "data.jsonl"
    rows = [{"prompt": f"the string {number}", "completion": f" of text {number}"} for number in range(20)]
    data.write_text("\n".join(map(json.dumps, rows)))
    return TrainConfig(
        data=data, output=tmp_path / "out", model=str(tiny_model("llama")), max_steps=3, eval_every=99
    )


@pytest.mark.parametrize("method", ["qlora", "prefix-tuning"])
def test_a_server_says_what_the_trainer_says(method: str, config: TrainConfig, tmp_path: Path) -> None:
    rows = train_and_compare(replace(config, method=method), 2)
    [row] = rows
    assert (row.name, row.trained_on, row.served_on) == (method, "nf4", "nf4")
    assert row.tokens > 10
    assert row.divergence < 0.01
    assert row.agreement > 0.8
    show(rows, tmp_path / "table.md")
    assert f"| {method} | nf4 | nf4 |" in (tmp_path / "table.md").read_text()


def test_one_adapter_on_two_forms_of_its_base(
    tiny_model: Callable[[str], Path], tiny_lora: Callable[..., Path], config: TrainConfig, tmp_path: Path
) -> None:
    save_gguf(tiny_model("llama"), tmp_path / "base.gguf", "Q8_0")
    (tmp_path / "q8_0").mkdir()
    convert_gguf(tmp_path / "base.gguf", tmp_path / "q8_0", lambda _: None)
    bases = [str(tiny_model("llama")), str(tmp_path / "q8_0")]
    row = on_two_bases(tiny_lora("llama", rank=4, seed=1), config.files[0], bases, 2)
    assert (row.trained_on, row.served_on) == tuple(bases)
    assert row.tokens >= 10
    assert 1e-3 < row.divergence < 5, "NF4 rounds, 8 bits hardly do"


def test_sides_that_differ_are_told_apart() -> None:
    one, other = [{1: -0.1, 2: -2.4}], [{1: -2.4, 2: -0.1}]
    assert compare("x", "a", "b", one, one).divergence == pytest.approx(0, abs=1e-9)
    row = compare("x", "a", "b", one, other)
    assert row.divergence == pytest.approx(0.905 * 2.3 - 0.0907 * 2.3, rel=0.01)
    assert row.agreement == 0
