"""Every family of models, served with LoRA adapters, against transformers and PEFT on the same 4-bit weights."""

from collections.abc import Callable, Sequence

import pytest
import torch

from support.models import MIXTURES, tiny_of
from support.peers import check_as_exact, check_greedy, logits
from support.serving import Feeder, Stream

Prompt = Callable[[int, int], list[int]]
LENGTH = 70
"""Tokens of a prompt: several pages, several windows of attention, no multiple of anything."""


TINY = tiny_of("tests/parity/test_families.py", "served")
THOROUGHLY = ["llama", "llama-odd", "mistral", "qwen2", "qwen3", "phi3", "gemma2", "gemma3", "gpt2", "glm"]
"""Those that among them have all that families differ by; the rest take one test."""


@pytest.fixture(params=THOROUGHLY)
def family(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def test_each_adapter_alone_gives_pefts_logits(family: str, served: Callable, prompt: Prompt) -> None:
    it = served(family)
    tokens = prompt(LENGTH, 1)
    base = logits(it.exact, tokens)
    for adapter, slot in it.slots.items():
        (ours,) = Feeder(it.model).logits([Stream(tokens, slot)])
        exact = logits(it.exact, tokens, adapter)
        check_as_exact(ours, logits(it.plain, tokens, adapter), exact, ties=family in MIXTURES)
        if adapter is not None:
            change = (exact - base).norm() / base.norm()
            assert change > 0.1, "the adapter does too little to tell whether it is there"


@pytest.mark.parametrize("sizes", [(1 << 30,), (17, 1, 40), (5,)], ids=["whole", "mixed chunks", "small chunks"])
def test_a_mixed_batch_gives_each_its_own(
    family: str, sizes: Sequence[int], served: Callable, prompt: Prompt
) -> None:
    it = served(family)
    wanted = [*it.slots.items(), *it.slots.items()]
    prompts = [prompt(LENGTH - 9 * index, index) for index in range(len(wanted))]
    streams = [Stream(tokens, slot) for tokens, (_, slot) in zip(prompts, wanted, strict=True)]
    found = Feeder(it.model).logits(streams, sizes)
    peers = [logits(it.plain, tokens, adapter) for tokens, (adapter, _) in zip(prompts, wanted, strict=True)]
    exact = [logits(it.exact, tokens, adapter) for tokens, (adapter, _) in zip(prompts, wanted, strict=True)]
    for adapter in range(len(it.slots)):
        both = slice(adapter, None, len(it.slots))
        mine, theirs, right = (torch.cat(each[both]) for each in (found, peers, exact))
        check_as_exact(mine, theirs, right, ties=family in MIXTURES)


def test_a_known_prefix_changes_nothing(family: str, served: Callable, prompt: Prompt) -> None:
    it = served(family)
    tokens = prompt(LENGTH, 2)
    for slot in it.slots.values():
        feeder = Feeder(it.model)
        first = Stream(tokens, slot)
        (whole,) = feeder.logits([first])
        for pages in (1, 3):
            again = Stream(tokens, slot, computed=16 * pages, blocks=first.blocks[:pages])
            (rest,) = feeder.logits([again])
            assert torch.equal(rest, whole[16 * pages :])


def test_greedy_tokens_are_those_of_generate(family: str, served: Callable, prompt: Prompt) -> None:
    it = served(family)
    new = 24
    prompts = [prompt(LENGTH - 20 * index, 10 + index) for index in range(len(it.slots))]
    streams = [Stream(list(p), slot) for p, slot in zip(prompts, it.slots.values(), strict=True)]
    found = Feeder(it.model).greedy(streams, new)
    pairs = zip(prompts, found, it.slots, strict=True)
    compared = sum(check_greedy(it.plain, tokens, ours, adapter) for tokens, ours, adapter in pairs)
    assert compared >= new, "they part too early to compare much"


@pytest.mark.parametrize("family", [name for name in TINY if name not in THOROUGHLY])
def test_every_other_family_alone_and_in_a_mixed_batch(family: str, served: Callable, prompt: Prompt) -> None:
    it = served(family)
    prompts = [prompt(LENGTH - 9 * index, index) for index in range(len(it.slots))]
    streams = [Stream(tokens, slot) for tokens, slot in zip(prompts, it.slots.values(), strict=True)]
    mixed = Feeder(it.model).logits(streams, (17, 1, 40))
    for tokens, (adapter, slot), in_company in zip(prompts, it.slots.items(), mixed, strict=True):
        (alone,) = Feeder(it.model).logits([Stream(tokens, slot)])
        exact = logits(it.exact, tokens, adapter)
        for ours in (alone, in_company):
            check_as_exact(ours, logits(it.plain, tokens, adapter), exact, ties=family in MIXTURES)
