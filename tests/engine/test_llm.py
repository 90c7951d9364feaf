"""`onebase.LLM`: many prompts and adapters in one call, text as the API has it, and nothing left behind."""

import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import onebase
from onebase import LLM, SamplingParams
from onebase_adapters.errors import (
    AdapterError,
    AdapterExistsError,
    AdapterFormatError,
    AdapterNotFoundError,
    ConfigError,
)
from onebase_engine.text.answer import GenerationError
from support.models import save_lora

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
PROMPTS = ["the stop string", "of this text", "import Tokenizer", "a byte-level tokenizer with a chat template"]
NAMES = ["one", "two", None, "one"]
BEFORE, AFTER, TURN = "Question: ", "\nAnswer:", "You answer."


def save_template(folder: Path, **config: object) -> Path:
    folder.mkdir()
    save_file({}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "TEMPLATE", **config}))
    return folder


def save_prompt(folder: Path) -> Path:
    """Virtual tokens that stand behind the prompt, and so before its answer."""
    folder.mkdir()
    numbers = torch.randn(4, 64, generator=torch.Generator().manual_seed(6))
    save_file({"prompt_embeddings": numbers}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "P_TUNING"}))
    (folder / "onebase.json").write_text(json.dumps({"places": [-1] * 4}))
    return folder


def save_head(folder: Path, model: Path, kind: str) -> Path:
    """A LoRA with a classifier of three labels beside it, as `tests/parity` has them against PEFT."""
    save_lora(folder, model, rank=4, modules=["q_proj"], seed=4)
    config = json.loads((folder / "adapter_config.json").read_text())
    task = {"sequence": "SEQ_CLS", "token": "TOKEN_CLS"}[kind]
    (folder / "adapter_config.json").write_text(json.dumps(config | {"task_type": task}))
    tensors = load_file(folder / "adapter_model.safetensors")
    name = "score" if kind == "sequence" else "classifier"
    tensors[f"base_model.model.{name}.weight"] = torch.randn(3, 64, generator=torch.Generator().manual_seed(5))
    save_file(tensors, folder / "adapter_model.safetensors")
    head = {"kind": kind, "pooling": "last", "labels": ["red", "green", "blue"]}
    (folder / "onebase.json").write_text(json.dumps({"head": head}))
    return folder


@pytest.fixture(scope="module")
def folders(llama: Path, loras: list[Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("llm")
    return {
        "one": loras[0],
        "two": loras[1],
        "text": save_template(
            root / "text", before=BEFORE, after=AFTER, messages=[{"role": "system", "content": TURN}]
        ),
        "behind": save_prompt(root / "behind"),
        "colour": save_head(root / "colour", llama, "sequence"),
        "colours": save_head(root / "colours", llama, "token"),
    }


@pytest.fixture(scope="module")
def shared(llama: Path, folders: dict[str, Path]) -> Iterator[LLM]:
    with LLM(str(llama), folders, device="cpu", cache_gib=0.01, max_adapters=3) as llm:
        yield llm


@pytest.fixture
def llm(shared: LLM) -> Iterator[LLM]:
    """The one LLM; after each test it must hold nothing."""
    yield shared
    stats = shared._engine.stats()
    assert (stats.running, stats.waiting, stats.blocks_used) == (0, 0, 0)
    assert not shared._arrived
    assert not any(resident.users for resident in shared._engine.residency._resident.values())


def test_prompts_with_their_own_adapters_get_what_each_gets_alone(llm: LLM) -> None:
    together = llm.generate(PROMPTS, GREEDY, NAMES)
    assert [output.adapter for output in together] == NAMES
    assert [output.prompt for output in together] == PROMPTS
    for prompt, name, output in zip(PROMPTS, NAMES, together, strict=True):
        (alone,) = llm.generate(prompt, GREEDY, name)
        assert alone.outputs == output.outputs
        assert len(output.outputs[0].token_ids) == 12
        assert output.outputs[0].finish_reason == "length"
        assert llm._codec.encode(prompt) == list(output.prompt_token_ids)
    (of_base,) = llm.generate(PROMPTS[0], GREEDY)
    assert of_base.outputs[0].token_ids != together[0].outputs[0].token_ids


def test_more_adapters_than_slots_all_get_their_turn(llm: LLM) -> None:
    names = ["one", "two", "text", "colour", "colours"]
    outputs = llm.generate(PROMPTS[0], GREEDY, None) + llm.generate([PROMPTS[0]] * 5, GREEDY, names)
    assert [len(output.outputs[0].token_ids) for output in outputs] == [12] * 6


def test_token_ids_are_a_prompt_as_text_is(llm: LLM) -> None:
    ids = llm._codec.encode(PROMPTS[0])
    by_text, by_ids = llm.generate(PROMPTS[0], GREEDY), llm.generate(ids, GREEDY)
    assert by_text[0].outputs == by_ids[0].outputs
    assert by_ids[0].prompt is None
    assert llm.generate([ids, PROMPTS[1]], GREEDY)[0].outputs == by_ids[0].outputs


def test_a_stream_is_what_generate_gives_and_two_can_be_taken_in_turns(llm: LLM) -> None:
    whole = [output.outputs[0].text for output in llm.generate(PROMPTS[:2], GREEDY, NAMES[:2])]
    assert "".join(llm.stream(PROMPTS[0], GREEDY, "one")) == whole[0]
    first, second = llm.stream(PROMPTS[0], GREEDY, "one"), llm.stream(PROMPTS[1], GREEDY, "two")
    begun = [next(first), next(second)]
    assert llm.generate(PROMPTS[0], GREEDY, "one")[0].outputs[0].text == whole[0]  # amid both
    assert [begun[0] + "".join(first), begun[1] + "".join(second)] == whole


def test_a_stream_that_is_left_ends_its_request(llm: LLM) -> None:
    pieces = llm.stream(PROMPTS[0], SamplingParams(max_tokens=100, ignore_eos=True), "one")
    assert len(list(islice(pieces, 3))) == 3
    assert llm._engine.busy == 1
    with pytest.raises(AdapterError, match="in use"):
        llm.unload_adapter("one")
    del pieces
    assert llm._engine.busy == 0


def test_chat_goes_through_the_bases_template_and_the_adapters_turns(llm: LLM) -> None:
    turns = [{"role": "user", "content": "Who?"}]
    plain, own = llm.chat([turns, turns], GREEDY, [None, "text"])
    asked = "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n"
    assert plain.prompt == asked
    assert own.prompt == f"<|im_start|>system\n{TURN}<|im_end|>\n{asked}"
    assert llm.chat(turns, GREEDY)[0].outputs == plain.outputs == llm.generate(asked, GREEDY)[0].outputs
    assert "".join(llm.stream(turns, GREEDY)) == plain.outputs[0].text


def test_chat_goes_through_an_adapters_own_template(llm: LLM, loras: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "own"
    shutil.copytree(loras[0], folder)
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }} =>")
    llm.load_adapter("own", folder)
    (written,) = llm.generate(["the stop string =>"], GREEDY, adapter="one")
    (chatted,) = llm.chat([[{"role": "user", "content": "the stop string"}]], GREEDY, adapter="own")
    llm.unload_adapter("own")
    assert chatted.outputs[0].text == written.outputs[0].text


def test_a_hard_prompt_is_around_text_and_tokens(llm: LLM) -> None:
    written = llm.generate(BEFORE + PROMPTS[0] + AFTER, GREEDY)[0]
    (by_text,) = llm.generate(PROMPTS[0], GREEDY, "text")
    (by_ids,) = llm.generate(llm._codec.encode(PROMPTS[0]), GREEDY, "text")
    assert by_text.outputs == written.outputs
    before, after = llm._codec.encode(BEFORE), llm._codec.encode(AFTER)
    assert list(by_ids.prompt_token_ids) == [*before, *llm._codec.encode(PROMPTS[0]), *after]


def test_a_stop_string_cuts_the_text_and_ends_the_request(llm: LLM, tmp_path: Path) -> None:
    whole = llm.generate(PROMPTS[0], GREEDY)[0].outputs[0]
    stop = whole.text[5:8]
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, stop=[stop])
    (cut,) = llm.generate(PROMPTS[0], params)
    assert cut.outputs[0].text == whole.text[: whole.text.index(stop)]
    assert (cut.outputs[0].finish_reason, cut.outputs[0].stop_reason) == ("stop", stop)
    assert 0 < len(cut.outputs[0].token_ids) < 12
    assert "".join(llm.stream(PROMPTS[0], params)) == cut.outputs[0].text
    llm.load_adapter("ends", save_template(tmp_path / "ends", stop=[stop]))
    assert llm.generate(PROMPTS[0], GREEDY, "ends")[0].outputs == cut.outputs
    llm.unload_adapter("ends")


def test_n_sequences_of_a_seed_differ_and_come_again(llm: LLM) -> None:
    params = SamplingParams(n=3, seed=7, temperature=1.0, max_tokens=10, ignore_eos=True, logprobs=2)
    first, second = llm.generate(PROMPTS[:2], params, ["one", None])
    assert [output.index for output in first.outputs] == [0, 1, 2]
    assert len({output.token_ids for output in (*first.outputs, *second.outputs)}) == 6
    assert llm.generate(PROMPTS[:2], params, ["one", None])[0].outputs == first.outputs
    for output in first.outputs:
        assert output.logprobs is not None
        assert [entry.token for entry in output.logprobs] == list(output.token_ids)
        assert all(len(entry.top) == 2 for entry in output.logprobs)


def test_each_prompt_can_have_settings_of_its_own(llm: LLM) -> None:
    short = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True)
    outputs = llm.generate(PROMPTS[:2], [GREEDY, short])
    assert [len(output.outputs[0].token_ids) for output in outputs] == [12, 3]


def test_classify_gives_a_row_for_a_text_or_for_each_token(llm: LLM) -> None:
    outputs = llm.classify(PROMPTS[:2], ["colour", "colours"])
    assert [len(output.probabilities) for output in outputs] == [1, len(outputs[1].prompt_token_ids)]
    for output in outputs:
        assert output.labels == ("red", "green", "blue")
        for row, best in zip(output.probabilities, output.best, strict=True):
            assert sum(row) == pytest.approx(1, abs=1e-4)
            assert row[output.labels.index(best)] == max(row)
    assert llm.classify(PROMPTS[0], "colour")[0] == outputs[0]
    with pytest.raises(AdapterError, match="no classification head"):
        llm.classify(PROMPTS[0], "one")


def test_embeddings_have_length_one_and_depend_on_the_adapter(llm: LLM) -> None:
    base, own = llm.embed([PROMPTS[0]] * 2, [None, "one"])
    assert len(base) == len(own) == 64
    assert sum(number**2 for number in own) == pytest.approx(1, abs=1e-4)
    assert base != own
    assert llm.embed(PROMPTS[0]) == [base]


@pytest.mark.parametrize("name", [None, "one", "text", "behind"])
def test_a_score_is_the_sum_of_what_was_generated_with(name: str | None, llm: LLM) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True, logprobs=0)
    made = llm.generate(PROMPTS[0], params, name)[0].outputs[0]
    assert made.logprobs is not None
    best, other = llm.score(PROMPTS[0], [made.token_ids, PROMPTS[1]], name)
    assert best.token_ids == made.token_ids
    assert best.logprob == sum(entry.logprob for entry in best.logprobs)
    assert best.logprob == pytest.approx(sum(entry.logprob for entry in made.logprobs), abs=0.15)
    assert all(entry.rank == 1 for entry in best.logprobs)
    assert other.logprob < best.logprob
    assert llm._codec.encode(PROMPTS[1]) == list(other.token_ids)


@pytest.mark.parametrize(
    ("ask", "error", "field", "says"),
    [
        (lambda llm: llm.generate("a", GREEDY, "three"), AdapterNotFoundError, "adapter", "colour, colours, one"),
        (lambda llm: llm.generate(["a", ""], GREEDY), ConfigError, "prompts[1]", "empty"),
        (lambda llm: llm.generate([9999], GREEDY), ConfigError, "prompts", "vocabulary"),
        (lambda llm: llm.generate([-1], GREEDY), ConfigError, "prompts", "vocabulary"),
        (lambda llm: llm.generate([{"prompt": "a"}]), ConfigError, "prompts", "text or token ids"),
        (lambda llm: llm.generate("\ud800", GREEDY), ConfigError, "prompts", "surrogate"),
        (lambda llm: llm.generate(["a", [5] * 300], GREEDY), GenerationError, "prompts[1]", "context holds 256"),
        (lambda llm: llm.generate(["a", "b"], [GREEDY]), ConfigError, "sampling_params", "one for each"),
        (lambda llm: llm.generate(["a", "b"], GREEDY, ["one"]), ConfigError, "adapter", "one for each"),
        (lambda llm: llm.stream("a", SamplingParams(n=2)), ConfigError, "n", "must be 1"),
        (lambda llm: llm.stream("a", GREEDY, "three"), AdapterNotFoundError, "adapter", "three"),
        (lambda llm: llm.score("a", "", None), ConfigError, "continuations", "empty"),
        (
            lambda llm: llm.generate("a", SamplingParams(stop_token_ids=(9999,))),
            ConfigError,
            "stop_token_ids",
            "9999",
        ),
        (lambda llm: llm.load_adapter("one", "/nowhere"), AdapterExistsError, "name", "taken"),
        (lambda llm: llm.unload_adapter("three"), AdapterNotFoundError, "name", "three"),
        (lambda _: SamplingParams(temperature=-1), ConfigError, "temperature", "between"),
        (lambda _: SamplingParams(stop=[""]), ConfigError, "stop", "empty"),
        (lambda _: SamplingParams(max_tokens=0), ConfigError, "max_tokens", "at least 1"),
        (lambda _: SamplingParams(top_p=float("nan")), ConfigError, "top_p", "above 0"),
    ],
)
def test_what_cannot_be_asked_is_told_with_its_field(
    ask: Callable, error: type[Exception], field: str, says: str, llm: LLM
) -> None:
    with pytest.raises(error, match=says) as caught:
        ask(llm)
    assert caught.value.field == field


def test_an_adapter_that_cannot_be_read_leaves_nothing(llm: LLM, tmp_path: Path) -> None:
    before = dict(llm.adapters)
    with pytest.raises(AdapterFormatError):
        llm.load_adapter("empty", save_template(tmp_path / "empty"))
    assert llm.adapters == before
    assert not any(digest.startswith("empty") for digest in llm._engine.residency._folders)


def test_a_name_that_is_loaded_anew_is_the_new_adapter(llm: LLM, loras: list[Path]) -> None:
    llm.load_adapter("again", loras[0])
    first = llm.generate(PROMPTS[3] * 3, GREEDY, "again")[0].outputs
    llm.unload_adapter("again")
    with pytest.raises(AdapterNotFoundError):
        llm.generate("a", GREEDY, "again")
    llm.load_adapter("again", loras[1])
    second = llm.generate(PROMPTS[3] * 3, GREEDY, "again")[0]
    assert second.cached_tokens == 0
    assert second.outputs == llm.generate(PROMPTS[3] * 3, GREEDY, "two")[0].outputs != first
    llm.unload_adapter("again")


def test_an_interrupt_ends_what_runs_once_the_step_is_whole(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    step, ended = llm._engine.step, []

    def interrupted() -> object:
        signal.raise_signal(signal.SIGINT)
        outputs = step()
        ended.append(True)
        return outputs

    monkeypatch.setattr(llm._engine, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(PROMPTS, SamplingParams(max_tokens=100, ignore_eos=True), NAMES)
    assert ended == [True]
    monkeypatch.undo()
    assert len(llm.generate(PROMPTS[0], GREEDY)[0].outputs[0].token_ids) == 12


def test_a_score_has_the_whole_context(llm: LLM) -> None:
    (score,) = llm.score([[5] * (llm.info.context - 3)], [[6, 7, 8]])
    assert len(score.logprobs) == 3
    with pytest.raises(GenerationError, match="the context holds"):
        llm.score([[5] * (llm.info.context - 2)], [[6, 7, 8]])


def test_an_encoder_decoder_generates_and_scores_and_does_nothing_else(
    tiny_model: Callable[[str], Path],
) -> None:
    with LLM(str(tiny_model("t5")), device="cpu", cache_gib=0.01) as llm:
        (made,) = llm.generate(PROMPTS[0], GREEDY)[0].outputs
        assert made.finish_reason == "length"
        (score,) = llm.score(PROMPTS[0], made.token_ids)
        assert [entry.rank for entry in score.logprobs] == [1] * len(made.token_ids)
        with pytest.raises(GenerationError, match="encoder-decoder"):
            llm.embed(PROMPTS[0])
        pieces = llm.stream(PROMPTS[0], GREEDY)
        next(pieces)
    with pytest.raises(ConfigError, match="closed"):
        list(pieces)
    with pytest.raises(ConfigError, match="closed"):
        llm.generate(PROMPTS[0], GREEDY)
    llm.close()


def test_the_readmes_example_runs(
    llama: Path, loras: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", readme, re.S) if "import LLM" in block]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").symlink_to(loras[0])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(onebase, "LLM", partial(LLM, str(llama), device="cpu", cache_gib=0.01))
    exec(compile(code, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert printed.startswith("mine ")
    assert printed.split()[-1] == "64"


def test_importing_onebase_imports_no_torch() -> None:
    code = (
        "import sys, onebase; from onebase import SamplingParams, TrainConfig; "
        "assert not {'torch', 'transformers', 'numba'} & set(sys.modules); "
        "from onebase import LLM, train; assert 'torch' in sys.modules; "
        "assert set(onebase.__all__) <= set(dir(onebase))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
