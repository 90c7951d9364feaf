"""An encoder-decoder (T5): the engine's greedy tokens against transformers' and PEFT's generate()."""

import json
import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSeq2SeqLM

from onebase_adapters.errors import AdapterMismatchError
from onebase_adapters.lowering.lower import load_adapter
from onebase_engine import startup
from onebase_engine.base.load_base import LoadedBase, load_base, quiet_loading
from onebase_engine.request import EngineRequest, SamplingParams
from onebase_engine.startup import start_engine
from support.engines import Driver, Result, engine_config
from support.methods import save_bottleneck, save_method
from support.peers import load_plain, with_adapters
from support.servers import ServeProcess

NEW = 12


@pytest.fixture(scope="module")
def folder(tiny_model: Callable[[str], Path]) -> Path:
    return tiny_model("t5")


@pytest.fixture(scope="module")
def adapters(folder: Path, tiny_lora: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two of LoRA, of different ranks and targets, and one each of IA3, prompt tuning and prefix tuning."""
    target = tmp_path_factory.mktemp("adapters")
    common = {"task_type": "SEQ_2_SEQ_LM"}
    ia3 = peft.IA3Config(target_modules=["k", "v", "wo"], feedforward_modules=["wo"], **common)
    return [
        tiny_lora("t5", rank=8, modules=["q", "v"], seed=1),
        tiny_lora("t5", rank=3, modules=["k", "o", "wi_0", "wo"], seed=2),
        save_method(target / "ia3", folder, ia3),
        save_method(target / "prompt", folder, peft.PromptTuningConfig(num_virtual_tokens=5, **common)),
        save_method(target / "prefix", folder, peft.PrefixTuningConfig(num_virtual_tokens=4, **common)),
    ]


@pytest.fixture(params=["exact", "nf4"])
def driver(
    request: pytest.FixtureRequest, folder: Path, adapters: list[Path], monkeypatch: pytest.MonkeyPatch
) -> Driver:
    """`exact`: in float32, not quantised; `nf4`: as it is served."""
    config = engine_config(folder, max_adapters=5)
    if request.param == "exact":
        config = replace_base(config, quantization="none")
        monkeypatch.setattr(startup, "load_base", load_float)
    return Driver(start_engine(config), adapters)


def replace_base(config: Any, **changes: Any) -> Any:
    return replace(config, base=replace(config.base, **changes))


def load_float(*args: Any, **options: Any) -> LoadedBase:
    base = load_base(*args, **options)
    base.model.float()
    return base


def oracle(folder: Path, adapter: Path | None) -> Any:
    with quiet_loading(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float32).eval()
        model.generation_config.eos_token_id = None  # as with ignore_eos
        return model if adapter is None else peft.PeftModel.from_pretrained(model, adapter).eval()


def expected(folder: Path, adapter: Path | None, prompt: list[int], new: int = NEW) -> list[int]:
    ids = torch.tensor([prompt])
    options = {"do_sample": False, "max_new_tokens": new, "attention_mask": torch.ones_like(ids)}
    made = oracle(folder, adapter).generate(input_ids=ids, **options)
    tokens: list[int] = made[0, 1:].tolist()
    return tokens


@pytest.mark.parametrize("driver", ["exact"], indirect=True)
def test_tokens_as_generate_alone_and_all_at_once(
    driver: Driver, folder: Path, adapters: list[Path], prompt: Any
) -> None:
    asked = [(None, prompt(20)), (None, prompt(1, 1)), *((a, prompt(9 + n, n)) for n, a in enumerate(adapters))]
    wanted = [expected(folder, adapter, tokens) for adapter, tokens in asked]
    assert len({tuple(tokens) for tokens in wanted}) == len(wanted)
    for number, (adapter, tokens) in enumerate(asked):
        alone = driver.submit(f"alone-{number}", tokens, adapter, max_tokens=NEW)
        driver.run()
        assert alone.tokens == wanted[number], adapter
    together = [driver.submit(f"{n}", tokens, a, max_tokens=NEW) for n, (a, tokens) in enumerate(asked)]
    driver.run()
    assert [result.tokens for result in together] == wanted
    assert not driver.engine.model._caches


@pytest.mark.parametrize("driver", ["exact"], indirect=True)
def test_composed_as_peft_concatenates_them(
    driver: Driver, folder: Path, adapters: list[Path], prompt: Any
) -> None:
    loras, tokens = adapters[:2], prompt(15)
    peer = with_adapters(oracle(folder, None), loras)
    peer.add_weighted_adapter([str(lora) for lora in loras], [0.7, 1.5], "both", combination_type="cat")
    peer.set_adapter("both")
    ids = torch.tensor([tokens])
    made = peer.generate(input_ids=ids, do_sample=False, max_new_tokens=NEW, attention_mask=torch.ones_like(ids))
    both = driver.submit("both", tokens, parts=dict(zip(loras, [0.7, 1.5], strict=True)), max_tokens=NEW)
    apart = [driver.submit(f"{n}", tokens, lora, max_tokens=NEW) for n, lora in enumerate(loras)]
    driver.run()
    assert both.tokens == made[0, 1:].tolist()
    assert both.tokens not in [result.tokens for result in apart]


@pytest.mark.parametrize("driver", ["nf4"], indirect=True)
@torch.inference_mode()
def test_tokens_in_four_bits_are_the_best_within_rounding(
    driver: Driver, folder: Path, adapters: list[Path], prompt: Any
) -> None:
    loras = adapters[:2]
    model = with_adapters(load_plain(folder), loras)
    asked = [(adapter, prompt(15, seed)) for seed, adapter in enumerate(loras)]
    results = [driver.submit(f"{n}", tokens, adapter, max_tokens=NEW) for n, (adapter, tokens) in enumerate(asked)]
    driver.run()
    for (adapter, tokens), result in zip(asked, results, strict=True):
        model.set_adapter(str(adapter))
        written = torch.tensor([[0, *result.tokens[:-1]]])
        scores = model(input_ids=torch.tensor([tokens]), decoder_input_ids=written).logits[0].float()
        short = scores.max(-1).values - scores.gather(1, torch.tensor(result.tokens)[:, None])[:, 0]
        assert (short <= 0.06 * scores.std(-1)).all()


@pytest.mark.parametrize("driver", ["exact"], indirect=True)
def test_a_preempted_one_is_computed_anew(driver: Driver, folder: Path, adapters: list[Path], prompt: Any) -> None:
    config = replace_base(engine_config(folder, blocks=6, max_adapters=5), quantization="none")
    tight = Driver(start_engine(config), adapters)
    asked = [(adapter, prompt(20 + n, n)) for n, adapter in enumerate([None, adapters[0], adapters[3]])]
    for each in (driver, tight):
        for number, (adapter, tokens) in enumerate(asked):
            each.submit(f"{number}", tokens, adapter, max_tokens=30)
        each.run()
    assert driver.engine.scheduler.preemptions == 0
    assert tight.engine.scheduler.preemptions > 0
    for name, result in tight.results.items():
        assert result.tokens == driver.results[name].tokens
    assert not tight.engine.model._caches


@pytest.mark.parametrize("driver", ["exact"], indirect=True)
def test_a_step_that_failed_half_way_is_due_again(
    driver: Driver, prompt: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask() -> list[Result]:
        return [driver.submit(f"{seed}", prompt(9, seed), max_tokens=NEW) for seed in range(3)]

    alone = ask()
    driver.run()
    results = ask()
    for _ in range(4):
        driver.step()
    model = driver.engine.model
    block = model._model.decoder.block[-1]
    forward, calls = block.forward, []

    def fail_once(*args: Any, **options: Any) -> Any:
        calls.append(args)
        if len(calls) == 1:  # the layers before it have the new tokens by then, and get them once more
            raise MemoryError
        return forward(*args, **options)

    monkeypatch.setattr(block, "forward", fail_once)
    driver.run()
    assert results[0].ending.error_kind == "out_of_memory"
    assert [result.tokens for result in results[1:]] == [result.tokens for result in alone[1:]]
    assert not model._caches


@pytest.mark.parametrize("driver", ["exact"], indirect=True)
@torch.inference_mode()
def test_what_is_said_is_scored_as_transformers_finds_it_likely(
    driver: Driver, folder: Path, adapters: list[Path], prompt: Any
) -> None:
    asked = [
        (None, prompt(15), prompt(7, 1)),
        *((a, prompt(9 + n, n), prompt(3 + n, 5)) for n, a in enumerate(adapters)),
    ]
    results = [
        driver.submit(f"{n}", tokens + said, adapter, task="score", said=len(said))
        for n, (adapter, tokens, said) in enumerate(asked)
    ]
    written = driver.submit("written", prompt(9, 3), adapters[0], max_tokens=NEW)
    driver.run()
    for (adapter, tokens, said), result in zip(asked, results, strict=True):
        heard = torch.tensor([[0, *said[:-1]]])
        logits = oracle(folder, adapter)(input_ids=torch.tensor([tokens]), decoder_input_ids=heard).logits[0]
        wanted = logits.log_softmax(-1).gather(1, torch.tensor(said)[:, None])[:, 0]
        found = torch.tensor([entry.logprob for entry in result.ending.prompt_logprobs])
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert written.tokens == expected(folder, adapters[0], prompt(9, 3))


@pytest.mark.parametrize("driver", ["nf4"], indirect=True)
def test_one_that_leaves_is_forgotten_and_its_end_token_ends_one(driver: Driver, prompt: Any) -> None:
    gone = driver.submit("gone", prompt(9), max_tokens=NEW)
    driver.step()
    assert driver.engine.model._caches.keys() == {"gone"}
    driver.engine.abort("gone")
    assert not driver.engine.model._caches
    del driver.results["gone"]
    ends = driver.submit("ends", prompt(9), max_tokens=NEW, stop_token_ids=(gone.tokens[0],))
    driver.run()
    assert (ends.tokens, ends.ending.finish_reason) == ([], "stop")
    assert not driver.engine.model._caches


@pytest.mark.parametrize("driver", ["nf4"], indirect=True)
def test_what_it_cannot_do_is_refused(driver: Driver) -> None:
    for request in (
        EngineRequest("c", (5, 6), SamplingParams(), task="classify"),
        EngineRequest("e", (5, 6), SamplingParams(), task="embed"),
        EngineRequest("p", (5, 6), SamplingParams(prompt_logprobs=1)),
    ):
        refused = driver.engine.submit(request)
        assert refused is not None
        assert refused.error_kind == "task"


@pytest.mark.parametrize("kind", ["bottleneck", "head", "embedding"])
@pytest.mark.parametrize("driver", ["nf4"], indirect=True)
def test_adapters_that_it_does_not_take(
    kind: str, driver: Driver, folder: Path, adapters: list[Path], tmp_path: Path
) -> None:
    task = {"task_type": "SEQ_2_SEQ_LM"}
    match kind:
        case "bottleneck":
            saved = save_bottleneck(tmp_path / kind, "pfeiffer", "relu", 4)
        case "head":
            saved = shutil.copytree(adapters[0], tmp_path / kind)
            weights = saved / "adapter_model.safetensors"
            save_file(load_file(weights) | {"score.weight": torch.ones(2, 64)}, weights)
            head = {"kind": "sequence", "pooling": "last", "labels": ["a", "b"]}
            (saved / "onebase.json").write_text(json.dumps({"head": head}))
        case _:
            saved = save_method(tmp_path / kind, folder, peft.LoraConfig(target_modules=["shared", "q"], **task))
    model = driver.engine.model
    with pytest.raises(AdapterMismatchError, match="is an encoder-decoder: it takes"):
        load_adapter(saved, "digest", model.shape, model.weights)


def test_the_server_completes_and_streams(folder: Path, adapters: list[Path], tmp_path: Path) -> None:
    server = ServeProcess(
        "--model", folder, "--served-name", "tiny", "--port", "0", "--device", "cpu", "--cache-gib", "0.01",
        "--adapter-root", adapters[0], "--admin-key", "admin", home=tmp_path,
    )  # fmt: skip
    try:
        url = server.wait_until_ready()
        body: dict[str, Any] = {"name": "lora", "path": "."}
        made = httpx.post(f"{url}/v1/adapters", json=body, headers={"authorization": "Bearer admin"})
        assert made.status_code == 201, made.text
        texts = {}
        for model in ("tiny", "lora"):
            body = {
                "model": model,
                "prompt": "the stop string",
                "max_tokens": 8,
                "temperature": 0,
                "ignore_eos": True,
            }
            reply = httpx.post(f"{url}/v1/completions", json=body)
            assert reply.status_code == 200, reply.text
            texts[model] = reply.json()["choices"][0]["text"]
            assert reply.json()["usage"]["completion_tokens"] == 8
            streamed = httpx.post(f"{url}/v1/completions", json=body | {"stream": True}).text
            pieces = [json.loads(line[6:]) for line in streamed.splitlines() if line.startswith("data: {")]
            assert "".join(piece["choices"][0]["text"] for piece in pieces if piece["choices"]) == texts[model]
        assert texts["tiny"] != texts["lora"]
        refused = httpx.post(f"{url}/v1/embeddings", json={"model": "tiny", "input": "x"})
        assert refused.status_code == 400, refused.text
        assert "encoder-decoder" in refused.json()["error"]["message"]
    finally:
        server.kill()
