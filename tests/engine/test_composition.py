"""Requests that compose adapters: the same engine, slots and pages; their parts are there as long as they run."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from support.methods import CONFIGS, save_method

PROMPT = torch.randint(3, 380, (40,), generator=torch.Generator().manual_seed(3)).tolist()


def test_one_part_as_it_is_is_that_adapter(new_driver: Callable, loras: list[Path]) -> None:
    driver = new_driver()
    alone = driver.submit("alone", PROMPT, loras[0], max_tokens=24)
    driver.run()
    composed = driver.submit("composed", PROMPT, parts={loras[0]: 1.0}, max_tokens=24)
    driver.run()
    assert composed.tokens == alone.tokens
    assert composed.cached_tokens == 0, "pages are a digest's own"


def test_in_a_mix_as_alone_and_with_pages_of_their_own(new_driver: Callable, loras: list[Path]) -> None:
    mixes = [{loras[0]: 0.7, loras[1]: 0.3}, {loras[0]: 0.3, loras[1]: 0.7}, dict.fromkeys(loras, 1.0)]
    quiet, busy = new_driver(reuse_prefixes=False), new_driver(max_adapters=4)
    for number, parts in enumerate(mixes):
        quiet.submit(str(number), PROMPT, parts=parts, max_tokens=24)
        quiet.run()
    for number, parts in enumerate(mixes):
        busy.submit(str(number), PROMPT, parts=parts, max_tokens=24)
        busy.submit(f"part-{number}", PROMPT, loras[number], max_tokens=24)
    busy.run()
    texts = [quiet.results[str(number)].tokens for number in range(len(mixes))]
    assert texts == [busy.results[str(number)].tokens for number in range(len(mixes))]
    parts_alone = [busy.results[f"part-{number}"].tokens for number in range(len(mixes))]
    assert len({tuple(tokens) for tokens in texts + parts_alone}) == 6
    again = busy.submit("again", PROMPT, parts=mixes[0], max_tokens=24)
    busy.run()
    assert again.tokens == texts[0]
    assert again.cached_tokens == 32


def test_an_unloaded_part_is_refused_and_one_in_use_counts_as_used(new_driver: Callable, loras: list[Path]) -> None:
    driver = new_driver(adapters=loras[:2])
    refused = driver.submit("unknown", PROMPT, parts={loras[0]: 1.0, loras[2]: 1.0})
    assert refused.ending.error_kind == "adapter"
    driver.submit("running", PROMPT, parts={loras[0]: 1.0, loras[1]: 0.5})
    assert not driver.engine.unload_adapter(str(loras[1]))
    driver.run()
    assert driver.engine.unload_adapter(str(loras[1]))


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.5, 1.0)])
def test_what_does_not_compose_ends_its_request_only(
    new_driver: Callable, llama: Path, loras: list[Path], tmp_path: Path, weights: tuple[float, float]
) -> None:
    prompts = [save_method(tmp_path / name, llama, CONFIGS["prompt-tuning"](), seed=1) for name in ("p", "q")]
    driver = new_driver(adapters=[*loras, *prompts])
    refused = driver.submit("refused", PROMPT, parts=dict(zip(prompts, weights, strict=True)))
    kept = driver.submit("kept", PROMPT, parts={prompts[0]: 1.0, loras[0]: 0.5})
    driver.run()
    assert (refused.ending.error_kind, refused.tokens) == ("composition", [])
    assert "p and q do not compose" in refused.ending.error
    assert len(kept.tokens) == 8
