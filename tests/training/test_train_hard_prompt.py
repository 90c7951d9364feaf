"""Hard prompts: what candidates there are, what is chosen, and what is written."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from onebase_adapters.errors import DataError
from onebase_adapters.lowering.lower import load_adapter
from onebase_adapters.primitives.instruction_set import Template
from onebase_contract.settings import TrainConfig
from onebase_engine.base.base_spec import BaseSpec
from onebase_engine.base.load_base import load_base
from onebase_engine.runner.batched_model import ServedModel
from onebase_training.data import NO_LOSS, Example, Turn
from onebase_training.data.encoding.encode_template import encode_with
from onebase_training.evaluation.evaluate_adapter import EvaluateConfig, evaluate_served
from onebase_training.evaluation.evaluation_result import sample
from onebase_training.training_run import train


@pytest.fixture
def config(tmp_path: Path, tiny_model: Callable[[str], Path]) -> TrainConfig:
    data = tmp_path / "data.jsonl"
    rows = [{"text": f"number {index}", "label": "odd" if index % 2 else "even"} for index in range(60)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows[:50]))
    eval_data = tmp_path / "eval.jsonl"
    eval_data.write_text("".join(json.dumps(row) + "\n" for row in rows[50:]))
    return TrainConfig(
        data=data,
        eval_data=eval_data,
        output=tmp_path / "out",
        method="hard-prompt",
        model=str(tiny_model("llama")),
        max_length=250,
        metric_examples=4,
        device="cpu",
    )


def test_it_beats_the_plain_prompt_and_writes_a_template(config: TrainConfig) -> None:
    result = train(config)
    assert result.after.loss < result.before.loss
    assert config.eval_data is not None
    served = evaluate_served(EvaluateConfig(config.eval_data, BaseSpec(config.model, device="cpu"), config.output))
    assert served.adapter is not None and served.base is not None
    assert served.adapter.loss == pytest.approx(result.after.loss, rel=0.02)
    assert served.base.loss == pytest.approx(result.before.loss, rel=0.02)
    settings = json.loads((config.output / "adapter_config.json").read_text())
    assert settings["peft_type"] == "TEMPLATE"
    assert settings["after"] == "\nLabel:"
    assert "\nLabel: even\n\n" in settings["before"] or "\nLabel: odd\n\n" in settings["before"]
    model = ServedModel.load(BaseSpec(config.model, device="cpu"), slots=1, blocks=8)
    (template,) = load_adapter(config.output, "digest", model.shape, model.weights).primitives
    assert template == Template(settings["before"], settings["after"], (), ("\n",))


def test_the_same_seed_chooses_the_same(config: TrainConfig) -> None:
    train(config)
    first = (config.output / "adapter_config.json").read_text()
    train(replace(config, overwrite=True))
    assert (config.output / "adapter_config.json").read_text() == first


def test_own_candidates(config: TrainConfig, tmp_path: Path) -> None:
    candidates = tmp_path / "candidates.jsonl"
    candidates.write_text('{"after": " is"}\n{"before": "A ", "after": " =", "stop": [";"]}\n')
    train(replace(config, candidates=candidates))
    settings = json.loads((config.output / "adapter_config.json").read_text())
    assert (settings["after"], settings["stop"]) in ((" is", ["\n"]), (" =", [";"]))


@pytest.mark.parametrize(
    "line", ["{", '"text"', '{"messages": [{"role": "user"}]}', '{"before": 3}', '{"stop": ""}', '{"befor": ""}']
)
def test_bad_candidates_are_refused_with_their_line(line: str, config: TrainConfig, tmp_path: Path) -> None:
    candidates = tmp_path / "candidates.jsonl"
    candidates.write_text(f'{{"after": " is"}}\n{line}\n')
    with pytest.raises(DataError, match="line 2"):
        train(replace(config, candidates=candidates))


def test_shown_answers_are_not_learned(tiny_model: Callable[[str], Path]) -> None:
    tokenizer = load_base(BaseSpec(str(tiny_model("llama")), device="cpu")).tokenizer
    shot = ({"role": "user", "content": "1"}, {"role": "assistant", "content": "odd"})
    chat = Example(1, turns=(Turn("user", "4"), Turn("assistant", "even")))
    plain = encode_with(Template(), [chat], tokenizer, 500)
    shown = encode_with(Template(messages=shot), [chat], tokenizer, 500)
    assert plain is not None and shown is not None
    assert len(shown[0].input_ids) > len(plain[0].input_ids)
    learned = [[label for label in one[0].labels if label != NO_LOSS] for one in (plain, shown)]
    assert learned[0] == learned[1]
    assert encode_with(Template(messages=shot), [chat], tokenizer, 10) is None


def test_an_answer_ends_where_the_template_says(tiny_model: Callable[[str], Path]) -> None:
    tokenizer = load_base(BaseSpec(str(tiny_model("llama")), device="cpu")).tokenizer
    found = encode_with(
        Template(after=" is", stop=("\n", ";")), [Example(1, prompt="4", label="even")], tokenizer, 500
    )
    assert found is not None
    learned = [label for label in found[0].labels if label != NO_LOSS]
    assert tokenizer.decode(learned) == " even\n", "the stop text stands for the end"
    for written, kept in ((" even\nnumber", " even"), (" even; \n", " even"), (" even", " even"), ("\n", "")):
        one = sample(tokenizer, found[0], tokenizer.encode(written))
        assert (one.expected, one.generated) == (" even", kept)


@pytest.mark.parametrize(
    ("completions", "stop"),
    [(["one", "two"], ["\n"]), (["one", "two\nlines"], ["\n\n"]), (["one", "two\n\nparts"], [])],
)
def test_what_no_answer_holds_ends_them(
    completions: list[str], stop: list[str], config: TrainConfig, tmp_path: Path
) -> None:
    rows = [{"prompt": f"{index}:", "completion": completions[index % 2]} for index in range(20)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    candidates = tmp_path / "candidates.jsonl"
    candidates.write_text('{"after": " ="}\n')
    train(replace(config, eval_data=None, candidates=candidates, metric_examples=0))
    assert json.loads((config.output / "adapter_config.json").read_text())["stop"] == stop
