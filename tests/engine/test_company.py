"""A request's tokens are its own: the same alone, in any mix, in chunks, after preemptions, and with known
prefixes; greedy and with a seed, with any settings."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher
from msgspec.structs import replace

from onebase_engine.request import Output
from onebase_engine.startup import start_engine
from support.engines import Driver, Result, engine_config
from support.models import targets

SHARED = torch.randint(3, 380, (64,), generator=torch.Generator().manual_seed(7)).tolist()
Request = tuple[list[int], int | None, dict[str, Any]]
"""prompt, which adapter, sampling"""


def requests() -> dict[str, Request]:
    """Prompts of all lengths, several with a common beginning; base and adapters; all kinds of sampling."""
    drawn = {"temperature": 0.9, "seed": 5}
    return {
        "greedy": (SHARED[:37], None, {"max_tokens": 47}),
        "adapted": (SHARED[:50], 0, {"max_tokens": 31}),
        "short": ([9], 1, {"max_tokens": 39}),
        "seeded": (SHARED[:33], 2, {**drawn, "max_tokens": 35}),
        "filtered": (SHARED[:33], 0, {**drawn, "top_p": 0.8, "top_k": 20, "max_tokens": 25}),
        "penalised": (SHARED[:20], None, {"repetition_penalty": 1.3, "frequency_penalty": 0.5, "max_tokens": 43}),
        "watched": (SHARED[:41], 1, {"logprobs": 3, "max_tokens": 27}),
        "prompted": (SHARED[:35], 0, {"prompt_logprobs": 2, "logprobs": 0, "max_tokens": 30}),
        "scored": (SHARED[:45], 2, {"task": "score", "said": 9, "prompt_logprobs": 1}),
        "biased": (SHARED[10:30], 2, {**drawn, "min_p": 0.05, "logit_bias": {17: 3.0}, "max_tokens": 29}),
        "guided": (
            SHARED[:25],
            1,
            {**drawn, "grammar": LLMatcher.grammar_from_regex("[a-z ]{30}[0-9]{30}"), "max_tokens": 45},
        ),
        "stopping": (SHARED[:16], None, {**drawn, "ignore_eos": False, "min_tokens": 3, "max_tokens": 67}),
    }


def submit(driver: Driver, adapters: list[Path], name: str, request: Request) -> Result:
    prompt, adapter, sampling = request
    return driver.submit(name, prompt, None if adapter is None else adapters[adapter], **sampling)


@pytest.fixture(scope="module")
def alone(llama: Path, loras: list[Path]) -> dict[str, Result]:
    """Each request by itself, whole, on an engine that forgets every prefix."""
    engine = start_engine(engine_config(llama, reuse_prefixes=False), progress=lambda _: None)
    driver = Driver(engine, loras)
    for name, request in requests().items():
        submit(driver, loras, name, request)
        driver.run()
    engine.close()
    return driver.results


def _without_times(ending: Output | None) -> Output:
    assert ending is not None
    return replace(ending, waited=0.0, cached_tokens=0)


def check_same(found: dict[str, Result], alone: dict[str, Result]) -> None:
    """To the last bit, logprobs included; only what was found in the cache differs."""
    assert set(found) == set(alone)
    for name, result in found.items():
        assert result.tokens == alone[name].tokens, name
        assert _without_times(result.ending) == _without_times(alone[name].ending), name
        assert result.logprobs == alone[name].logprobs, name
        assert result.prompt_logprobs == alone[name].prompt_logprobs, name


@pytest.mark.parametrize(
    "options",
    [{}, {"max_batch_tokens": 7}, {"max_batch_tokens": 33, "max_running": 3}, {"reuse_prefixes": False}],
    ids=["all at once", "small chunks", "three at a time", "no prefixes"],
)
def test_in_a_mix(options: dict[str, Any], new_driver: Callable, loras: list[Path], alone: dict) -> None:
    driver = new_driver(**options)
    for name, request in requests().items():
        submit(driver, loras, name, request)
    driver.run()
    check_same(driver.results, alone)


@pytest.mark.parametrize("budget", [512, 10])
def test_when_preempted(budget: int, new_driver: Callable, loras: list[Path], alone: dict) -> None:
    driver = new_driver(blocks=7, max_batch_tokens=budget)
    for name, request in requests().items():
        submit(driver, loras, name, request)
    driver.run()
    assert driver.engine.stats().preemptions > 0
    check_same(driver.results, alone)


def test_with_known_prefixes(new_driver: Callable, loras: list[Path], alone: dict) -> None:
    driver = new_driver()
    for _ in range(2):
        for name, request in requests().items():
            submit(driver, loras, name, request)
        driver.run()
        check_same(driver.results, alone)
    hits = {name: result.cached_tokens for name, result in driver.results.items() if result.cached_tokens}
    # All but the prompts below one block, and the one that wants its prompt's logprobs.
    assert set(hits) == set(alone) - {"short", "stopping", "prompted"}


@settings(max_examples=12)
@given(data=st.data())
def test_whenever_others_come_and_go(data: st.DataObject, llama: Path, loras: list[Path], alone: dict) -> None:
    engine = start_engine(
        engine_config(llama, blocks=data.draw(st.integers(7, 40)), max_batch_tokens=data.draw(st.integers(3, 90))),
        progress=lambda _: None,
    )
    driver = Driver(engine, loras)
    for name in data.draw(st.permutations(list(requests()))):
        submit(driver, loras, name, requests()[name])
        if data.draw(st.booleans()):
            stranger = f"{name}'s neighbour"
            driver.submit(stranger, SHARED[:30], data.draw(st.sampled_from([None, *loras])), max_tokens=30)
            driver.step()
            if driver.results[stranger].ending is None:
                engine.abort(stranger)
            del driver.results[stranger]
        for _ in range(data.draw(st.integers(0, 4))):
            driver.step()
    driver.run()
    engine.close()
    check_same(driver.results, alone)


@pytest.mark.parametrize(
    "family", ["mistral", "qwen2", "qwen3", "phi3", "gemma2", "gemma3", "gpt2", "glm", "mixtral", "qwen3_moe"]
)
def test_other_families_too(family: str, new_driver: Callable, tiny_model: Callable, tiny_lora: Callable) -> None:
    """On transformers' own layers the promise holds as well, as far as their products keep rows apart."""
    folder = tiny_model(family)
    adapters = [tiny_lora(family, rank=rank, modules=list(targets(family)), seed=rank) for rank in (8, 3)]
    prompts = [(SHARED[:n], adapter) for n in (60, 33, 5) for adapter in (None, *adapters)]
    lone = new_driver(folder, adapters, reuse_prefixes=False)
    for index, (prompt, adapter) in enumerate(prompts):
        lone.submit(str(index), prompt, adapter)
        lone.run()
    for options in ({}, {"max_batch_tokens": 11}, {"blocks": 8}):
        driver = new_driver(folder, adapters, **options)
        for index, (prompt, adapter) in enumerate(prompts):
            driver.submit(str(index), prompt, adapter)
        driver.run()
        assert {k: r.tokens for k, r in driver.results.items()} == {k: r.tokens for k, r in lone.results.items()}
