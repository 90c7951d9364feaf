"""What serving an adapter is said to cost."""

from collections.abc import Callable
from pathlib import Path

from onebase_adapters.primitives.instruction_set import Template
from onebase_engine.base.base_spec import BaseSpec
from onebase_training.data import Example
from onebase_training.evaluation.serving_cost import serving_cost
from onebase_training.methods.hard_prompt import write_template

EXAMPLES = [Example(number, prompt=f"What is {number}?", completion=" 1") for number in range(3)]


def test_a_hard_prompt_costs_its_text(tmp_path: Path, tiny_model: Callable[[str], Path]) -> None:
    spec = BaseSpec(str(tiny_model("llama")), device="cpu")
    write_template(Template(before="one two three\n\n"), tmp_path, spec.model)
    cost = serving_cost(tmp_path, spec, EXAMPLES)
    assert cost.context > 3
    assert cost.times is not None
    assert 0.2 < cost.times < 20
    write_template(Template(before="one two three\n\n" * 2), tmp_path, spec.model)
    assert serving_cost(tmp_path, spec, EXAMPLES).context == 2 * cost.context


def test_examples_that_its_text_leaves_no_room_for_are_left_out(
    tmp_path: Path, tiny_model: Callable[[str], Path]
) -> None:
    spec = BaseSpec(str(tiny_model("llama")), device="cpu")
    long = Example(9, prompt="word " * 200, completion=" 1")
    write_template(Template(before="one two three\n\n" * 4), tmp_path, spec.model)
    alone = serving_cost(tmp_path, spec, EXAMPLES)
    assert alone.times is not None
    assert serving_cost(tmp_path, spec, [*EXAMPLES, long]).context == alone.context
    assert serving_cost(tmp_path, spec, [long]).times is None


def test_what_cannot_be_served_says_why(tmp_path: Path, tiny_model: Callable[[str], Path]) -> None:
    cost = serving_cost(tmp_path, BaseSpec(str(tiny_model("llama")), device="cpu"), EXAMPLES)
    assert cost.times is None
    assert "adapter_config.json" in cost.refused
