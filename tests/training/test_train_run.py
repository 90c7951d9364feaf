"""Whole runs on a tiny base: what they write, what they refuse, and how they go on after a kill."""

import hashlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from rich.console import Console
from safetensors.torch import load_file

from onebase.cli.terminal.run_view import show
from onebase_adapters.errors import AdapterMismatchError, ConfigError, DataError
from onebase_adapters.formats.read_adapter import check_base, read_adapter
from onebase_contract.events import Evaluated, Event, Stage, Step, json_lines
from onebase_contract.run_folder import Workspace
from onebase_contract.settings import Arithmetic, TrainConfig
from onebase_engine.base.base_spec import BaseSpec, Quantization
from onebase_engine.base.load_base import load_base
from onebase_training.model.frozen_weights import expand_in_passes, hold
from onebase_training.model.trained_model import Trained
from onebase_training.training_run import train

ANIMALS = ("cat", "dog", "cow", "owl", "ant", "bee", "fox", "hen")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Prompts that name an animal and a number; the answer is the animal."""
    path = tmp_path / "data.jsonl"
    rows = [
        {"prompt": f"{index} {ANIMALS[index % 8]} =", "completion": f" {ANIMALS[index % 8]}"} for index in range(80)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def config(data: Path, tmp_path: Path, tiny_model: Callable[[str], Path]) -> TrainConfig:
    return TrainConfig(
        data=data,
        output=tmp_path / "out" / "animals",
        model=str(tiny_model("llama")),
        rank=4,
        batch_tokens=128,
        epochs=4,
        eval_every=10,
        metric_examples=4,
        device="cpu",
    )


def left_behind(config: TrainConfig) -> list[str]:
    return sorted(path.name for path in config.output.parent.iterdir()) if config.output.parent.exists() else []


def tensors(config: TrainConfig) -> dict[str, torch.Tensor]:
    return load_file(config.output / "adapter_model.safetensors")


@pytest.mark.parametrize("method", ["qlora", "lora"])
def test_a_run_learns_and_writes_an_adapter_that_reads_back(method: str, config: TrainConfig) -> None:
    events: list[Event] = []
    result = train(replace(config, method=method), events.append)
    assert result.after.loss < result.before.loss - 0.5
    assert left_behind(config) == ["animals"]

    files = read_adapter(config.output)
    assert files.config["peft_type"] == "LORA"
    assert files.config["base_model_name_or_path"] == config.model
    card = (config.output / "README.md").read_text()
    header = dict(line.split(": ", 1) for line in card.split("---\n")[1].splitlines())
    assert json.loads(header["base_model"]) == config.model
    assert json.loads(header["tags"]) == ["onebase", method]
    assert f"| loss | {result.before.loss:.4g} | {result.after.loss:.4g} |" in card
    assert files.sidecar["method"] == method
    assert files.sidecar["base"]["quantization"] == {"qlora": "nf4", "lora": "none"}[method]
    assert files.sidecar["metrics"]["after"]["loss"] == result.after.loss
    assert files.sidecar["settings"]["rank"] == 4
    assert files.sidecar["data"]["examples"] == 72

    steps = [event for event in events if isinstance(event, Step)]
    assert [event.step for event in steps] == list(range(1, result.steps + 1))
    assert steps[-1].seconds_left == 0
    measured = [event for event in events if isinstance(event, Evaluated)]
    assert min(event.loss for event in measured) == pytest.approx(result.after.loss, rel=1e-5)
    assert any(isinstance(event, Stage) for event in events)
    history = json.loads((config.output / "metrics.json").read_text())["history"]
    assert [row["step"] for row in history if "loss" in row] == list(range(1, result.steps + 1))


@pytest.mark.parametrize("head", [False, True])
def test_a_classifications_best_checkpoint_is_told_by_its_answers(
    head: bool, config: TrainConfig, tmp_path: Path
) -> None:
    rows = [{"text": f"{index} {ANIMALS[index % 4]}", "label": ANIMALS[index % 4]} for index in range(96)]
    for name, part in (("train", rows[:72]), ("held", rows[72:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    files = {"data": tmp_path / "train.jsonl", "eval_data": tmp_path / "held.jsonl"}
    events: list[Event] = []
    result = train(
        replace(config, **files, head=head, epochs=8, learning_rate=1e-2, metric_examples=24), events.append
    )
    best = [event for event in events if isinstance(event, Evaluated) and event.best][-1]
    assert result.after.score is not None
    assert result.after.score.metric == "accuracy"
    assert best.accuracy == pytest.approx(result.after.score.value)  # of greedy answers
    assert best.loss == pytest.approx(result.after.loss, rel=1e-5)
    assert best.accuracy > 0.3


def test_steps_of_so_many_examples_and_a_multiple_of_the_methods_rate(config: TrainConfig) -> None:
    """72 examples of some 10 tokens: 12 steps of 6, each in passes of at most 40 tokens on average, or in one."""

    def steps(**changes: object) -> tuple[list[Step], dict[str, torch.Tensor]]:
        events: list[Event] = []
        once = replace(config, epochs=1, metric_examples=0, patience=0, overwrite=True, **changes)  # type: ignore[arg-type]
        train(once, events.append)
        return [event for event in events if isinstance(event, Step)], tensors(config)

    split, learned = steps(batch_size=6, batch_tokens=40)
    whole, same = steps(batch_size=6, batch_tokens=128)
    assert len(split) == len(whole) == 12
    for name, tensor in learned.items():
        torch.testing.assert_close(tensor, same[name], rtol=0.1, atol=2e-3)
    doubled, _ = steps(batch_size=6, batch_tokens=128, learning_rate_multiplier=2.0)
    assert [step.learning_rate for step in doubled] == pytest.approx([2 * step.learning_rate for step in whole])
    settings = read_adapter(config.output).sidecar["settings"]
    assert settings["batch_size"] == 6
    assert settings["learning_rate"] == pytest.approx(2 * max(step.learning_rate for step in whole), rel=0.1)
    steps(batch_tokens=None)
    assert read_adapter(config.output).sidecar["settings"]["batch_tokens"] == 256
    with pytest.raises(ConfigError, match="follows from it"):
        replace(config, batch_size=4, accumulate=2)


def test_the_adapter_is_for_this_base_and_no_other(config: TrainConfig, tiny_model: Callable[[str], Path]) -> None:
    train(replace(config, max_steps=2))
    files = read_adapter(config.output)
    check_base(files, load_base(BaseSpec(config.model, device="cpu")).shape)
    with pytest.raises(AdapterMismatchError):
        check_base(files, load_base(BaseSpec(str(tiny_model("qwen2")), device="cpu")).shape)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_expanded_weights_are_those_that_are_held(
    tiny_model: Callable[[str], Path], dtype: torch.dtype, quantization: Quantization
) -> None:
    """Forth and back, in both arithmetics; and a held weight is the bfloat16 value of the 4-bit code."""
    spec = BaseSpec(str(tiny_model("qwen2")), quantization, device="cpu")  # it has biases
    expanded, held, loaded = (load_base(spec).model.train() for _ in range(3))
    before = sum(value.nbytes for value in expanded.parameters())
    expand_in_passes(expanded, dtype)
    assert sum(value.nbytes for value in expanded.parameters()) < 1.05 * before
    hold(held, dtype)
    tokens = torch.arange(7)[None]
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.2.mlp.up_proj", "lm_head"):
        x = torch.randn(1, 7, held.get_submodule(name).in_features, dtype=dtype, requires_grad=True)
        outputs = [model.get_submodule(name)(x) for model in (expanded, held)]
        assert torch.equal(*outputs)
        gradients = [torch.autograd.grad(out.float().sum(), x)[0] for out in outputs]
        assert torch.equal(*gradients)
        weight = loaded.get_submodule(name).weight
        state = getattr(weight, "quant_state", None)
        values = weight if state is None else dequantize_4bit(weight.data, state)
        assert torch.equal(held.get_submodule(name).weight, values.to(torch.bfloat16).to(dtype))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        ours, theirs = (model(input_ids=tokens).logits for model in (expanded, held))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("arithmetic", get_args(Arithmetic))
def test_weights_kept_in_4_bit_train_to_the_same_adapter(config: TrainConfig, arithmetic: Arithmetic) -> None:
    config = replace(config, max_steps=6, arithmetic=arithmetic)
    train(replace(config, dequantize="always"))
    expanded = tensors(config)
    train(replace(config, dequantize="never", overwrite=True))
    for name, value in tensors(config).items():
        torch.testing.assert_close(value, expanded[name], rtol=0, atol=2e-3)


@pytest.mark.parametrize("method", ["qlora", "lora", "full"])
def test_both_arithmetics_learn_alike(config: TrainConfig, method: str) -> None:
    config = replace(config, method=method, max_steps=20, eval_every=5, learning_rate=0.002)
    curves = []
    for arithmetic in get_args(Arithmetic):
        result = train(replace(config, arithmetic=arithmetic, overwrite=True))
        assert result.notes["settings"]["arithmetic"] == arithmetic
        curves.append([row["eval_loss"] for row in result.history if "eval_loss" in row])
    assert curves[0][-1] < 0.9 * curves[0][0]
    assert curves[0] == pytest.approx(curves[1], rel=0.02)


def test_a_resumed_run_keeps_its_arithmetic(config: TrainConfig) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(replace(config, arithmetic="float32"), _stop_at_checkpoint)
    with pytest.raises(ConfigError, match="arithmetic"):
        train(replace(config, arithmetic="bf16", resume=True))
    assert train(replace(config, resume=True)).notes["settings"]["arithmetic"] == "float32"


def _stop_at_checkpoint(event: Event) -> None:
    if isinstance(event, Step) and event.step == 11:
        raise KeyboardInterrupt


def test_recomputed_activations_change_no_adapter(config: TrainConfig) -> None:
    config = replace(config, max_steps=4)
    train(config)
    kept = tensors(config)
    train(replace(config, checkpointing="always", overwrite=True))
    assert all(torch.equal(value, kept[name]) for name, value in tensors(config).items())


def test_a_batch_that_cannot_fit_is_refused_before_training(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onebase_training.fitting.estimate.free_memory", lambda _: 1 << 16)
    with pytest.raises(ConfigError, match="batch-tokens"):
        train(config)
    assert left_behind(config) == []


def test_a_run_that_fails_leaves_nothing(config: TrainConfig) -> None:
    def stop(event: Event) -> None:
        if isinstance(event, Step) and event.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, stop)
    assert left_behind(config) == []


def test_a_stopped_run_goes_on_to_the_same_result(config: TrainConfig) -> None:
    config = replace(config, dropout=0.2)
    train(config)
    expected = tensors(config)

    def stop(event: Event) -> None:
        if isinstance(event, Step) and event.step == 15:
            raise KeyboardInterrupt

    other = replace(config, output=config.output.with_name("other"))
    with pytest.raises(KeyboardInterrupt):
        train(other, stop)
    with pytest.raises(ConfigError, match="unfinished"):
        train(other)
    with pytest.raises(ConfigError, match="seed"):
        train(replace(other, resume=True, seed=5))
    steps: list[int] = []
    train(replace(other, resume=True), lambda event: steps.append(event.step) if isinstance(event, Step) else None)
    assert steps[0] == 11
    assert all(torch.equal(value, expected[name]) for name, value in tensors(other).items())
    with pytest.raises(ConfigError, match="nothing to resume"):
        train(replace(other, resume=True))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_tells_what_is_saved_and_how_to_go_on(
    number: signal.Signals, config: TrainConfig, tmp_path: Path
) -> None:
    script = tmp_path / "onebase"
    script.write_text("from onebase.cli.main import main\nmain()\n")
    output = str(config.output)
    options = ["train", "--data", str(config.data), "--output", output, "--model", config.model, "--device", "cpu"]
    options += ["--rank", "4", "--batch-tokens", "128", "--epochs", "4", "--eval-every", "10", "--metric-examples"]
    run = subprocess.Popen(
        [sys.executable, script, *options, "4", "--overwrite"],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": ":".join(sys.path)},
    )
    checkpoint = config.output.parent / ".animals.training" / "checkpoint-10"
    give_up = time.monotonic() + 60
    while not checkpoint.exists() and run.poll() is None and time.monotonic() < give_up:
        time.sleep(0.01)
    run.send_signal(number)
    told = run.communicate(timeout=60)[1]
    assert run.returncode == 130, told
    assert "Traceback" not in told
    step = re.search(r"Step (\d+) is saved", told)
    assert step is not None
    assert told.splitlines()[-1].split() == ["onebase", *options, "4", "--resume"]
    steps: list[int] = []
    train(replace(config, resume=True), lambda event: steps.append(event.step) if isinstance(event, Step) else None)
    assert steps[0] == int(step[1]) + 1


def test_a_run_without_a_checkpoint_blocks_nothing_and_one_that_goes_on_does(config: TrainConfig) -> None:
    config = replace(config, max_steps=2)
    killed = Workspace.of(config)
    killed.output.parent.mkdir(parents=True, exist_ok=True)
    killed.begin(config)  # and killed before its first checkpoint
    with pytest.raises(ConfigError, match="Another process is training"):
        train(config)
    killed.let_go()
    train(config)
    assert left_behind(config) == ["animals"]
    other = replace(config, output=config.output.with_name("other"))
    other_run = Workspace.of(other)
    other_run.begin(other)
    other_run.let_go()
    (other_run.folder / "checkpoint-1").mkdir()
    with pytest.raises(ConfigError, match="Go on with --resume"):
        train(other)


def test_an_existing_output_is_kept_unless_told_otherwise(config: TrainConfig) -> None:
    config = replace(config, max_steps=2)
    config.output.mkdir(parents=True)
    (config.output / "mine.txt").write_text("precious")
    with pytest.raises(ConfigError, match="exists"):
        train(config)
    assert (config.output / "mine.txt").read_text() == "precious"
    train(replace(config, overwrite=True))
    assert not (config.output / "mine.txt").exists()


def test_an_early_stop_keeps_the_best_checkpoint(config: TrainConfig) -> None:
    events: list[Event] = []
    result = train(replace(config, epochs=20, learning_rate=0.05, eval_every=4, patience=2), events.append)
    losses = [event.loss for event in events if isinstance(event, Evaluated)]
    assert result.stopped in ("plateau", "over-fitting")
    assert losses[-1] > min(losses)
    assert result.after.loss == pytest.approx(min(losses), rel=1e-5)


def test_a_run_killed_after_an_early_stop_is_finished_and_not_continued(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(config, epochs=20, learning_rate=0.05, eval_every=4, patience=2)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("onebase_training.training_run.write_adapter", killed)
        train(config)
    result = train(replace(config, resume=True))
    assert result.stopped in ("plateau", "over-fitting")
    whole = replace(config, output=config.output.with_name("whole"))
    assert train(whole).steps == result.steps
    assert all(torch.equal(value, tensors(whole)[name]) for name, value in tensors(config).items())


def test_a_loss_that_is_no_number_ends_the_run_with_the_way_out(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = Trained.forward

    def broken(self: Trained, **batch: torch.Tensor) -> torch.Tensor:
        return usual(self, **batch) * (float("nan") if self.training and torch.is_grad_enabled() else 1)

    monkeypatch.setattr(Trained, "forward", broken)
    with pytest.raises(ConfigError, match="learning-rate"):
        train(config)
    assert left_behind(config) == []


def test_doubts_about_the_data_are_told_before_training(config: TrainConfig, tmp_path: Path) -> None:
    told: list[str] = []
    again = replace(config, eval_data=config.files[0], max_steps=1)
    train(again, lambda event: told.append(event.text) if isinstance(event, Stage) else None)
    assert any("80 examples to train on (prompt-completion), 80 held out" in line for line in told)
    assert any("held out, but nearly as in training" in line for line in told)


def test_events_as_json_lines(config: TrainConfig) -> None:
    stream = io.StringIO()
    with json_lines(stream) as progress:
        train(replace(config, max_steps=2, eval_every=2), progress)
    events = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert {event["event"] for event in events} == {"stage", "part", "step", "evaluated"}
    assert [event["step"] for event in events if event["event"] == "step"] == [1, 2]


def test_the_end_shows_how_the_adapter_is_asked(config: TrainConfig) -> None:
    written = io.StringIO()
    result = train(replace(config, max_steps=1))
    show(result, Console(file=written, width=200))
    asked = result.after.samples[0]
    assert f"to the prompt {asked.prompt!r} it answers {asked.generated!r}." in written.getvalue()
    assert asked.prompt.endswith(" =")


def test_the_time_limit_ends_the_run(config: TrainConfig) -> None:
    result = train(replace(config, epochs=100, time_limit=0.5, patience=0))
    assert 0 < result.steps < 500
    assert result.stopped == "time limit"
    assert (config.output / "adapter_model.safetensors").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "magic"}, "qlora"),
        ({"rank": 0}, "rank"),
        ({"targets": ("nonsense",)}, "nonsense"),
        ({"resume": True}, "no unfinished run"),
        ({"resume": True, "overwrite": True}, "choose one"),
    ],
)
def test_settings_that_cannot_work_are_refused(
    change: dict[str, object], message: str, config: TrainConfig
) -> None:
    with pytest.raises(ConfigError, match=message):
        train(replace(config, **change))  # type: ignore[arg-type]
    assert left_behind(config) == []


def test_an_example_over_the_limit_is_refused_with_its_line(config: TrainConfig) -> None:
    with pytest.raises(DataError, match="line 1"):
        train(replace(config, max_length=2))
    assert left_behind(config) == []


def test_the_report_stands_alone_and_escapes_what_it_shows(config: TrainConfig, tmp_path: Path) -> None:
    data = tmp_path / "html.jsonl"
    rows = [{"prompt": f"{index} <script>alert(1)</script> =", "completion": " <b>"} for index in range(30)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    train(replace(config, data=data, max_steps=3))
    page = (config.output / "report.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert "http" not in page.replace("http-equiv", "")
    points = page.split('class="train" fill="none" stroke-width="1" points="')[1].split('"')[0].split()
    assert len(points) == 3
    digest = hashlib.sha256((config.output / "adapter_model.safetensors").read_bytes()).hexdigest()
    assert digest in page
