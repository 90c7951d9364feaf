"""Each sampling setting against a plain reimplementation, over the whole distribution that it leaves."""

from collections.abc import Sequence as Items
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from onebase_engine.request import EngineRequest, SamplingParams
from onebase_engine.runner.lm_head import LogitScores
from onebase_engine.sampling.sampler import describe, sample
from onebase_engine.scheduling.sequence import Sequence

VOCAB = 40
EOS = 3


def sequence(name: str = "a", prompt: Items[int] = (1, 2), output: Items[int] = (), **sampling: Any) -> Sequence:
    request = EngineRequest(name, tuple(prompt), SamplingParams(**{"max_tokens": 1000} | sampling))
    made = Sequence(request, 1, frozenset({EOS}))
    made.tokens += output
    return made


def scores(logits: torch.Tensor) -> LogitScores:
    return LogitScores(logits, torch.empty(len(logits), 0))


def choose(logits: torch.Tensor, sequences: Items[Sequence]) -> list[int]:
    return [choice.token for choice in sample(scores(logits), range(len(sequences)), sequences)]


def random_logits(rows: int, seed: int = 0, vocab: int = VOCAB) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 2


def penalised(logits: np.ndarray, of: Sequence) -> np.ndarray:
    """One token at a time, as vLLM documents it."""
    sampling = of.request.sampling
    scores = logits.astype(np.float64)
    output = of.tokens[of.prompt_tokens :]
    for token in range(len(scores)):
        if token in of.tokens:
            penalty = sampling.repetition_penalty
            scores[token] = scores[token] / penalty if scores[token] > 0 else scores[token] * penalty
        count = output.count(token)
        scores[token] -= sampling.frequency_penalty * count + sampling.presence_penalty * (count > 0)
        scores[token] += sampling.logit_bias.get(token, 0.0)
        if len(output) < sampling.min_tokens and token in of.stop_tokens:
            scores[token] = -np.inf
    return scores


def distribution(logits: np.ndarray, of: Sequence) -> np.ndarray:
    """Penalties, temperature, then min_p, top_k and top_p one after the other, each on what is left."""
    sampling = of.request.sampling
    scores = penalised(logits, of) / sampling.temperature
    left = np.exp(scores - scores.max())
    left /= left.sum()
    left[left < sampling.min_p * left.max()] = 0
    order = np.argsort(-left, kind="stable")
    if sampling.top_k:
        left[order[sampling.top_k :]] = 0
    left /= left.sum()
    before = np.cumsum(left[order]) - left[order]
    if sampling.top_p < 1:
        left[order[before >= sampling.top_p]] = 0
    return left / left.sum()


SETTINGS: list[dict[str, Any]] = [
    {"temperature": 1.0},
    {"temperature": 0.3},
    {"temperature": 2.5},
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": 1000},
    {"top_p": 0.7},
    {"top_p": 0.01},
    {"min_p": 0.2},
    {"top_k": 8, "top_p": 0.6},
    {"top_p": 0.9, "min_p": 0.1},
    {"top_k": 6, "top_p": 0.8, "min_p": 0.05, "temperature": 1.7},
    {"repetition_penalty": 1.8},
    {"presence_penalty": 1.5, "frequency_penalty": 0.7},
    {"logit_bias": {5: 4.0, 9: -100.0}},
    {"min_tokens": 50},
    {"min_tokens": 50, "stop_token_ids": (7, 11), "ignore_eos": True, "top_p": 0.8},
]
HISTORY = [4, 4, 8, 15, 16, 23, 4]


@pytest.mark.parametrize("sampling", SETTINGS, ids=str)
def test_draws_follow_the_distribution_that_the_settings_leave(sampling: dict[str, Any]) -> None:
    logits = random_logits(1, seed=2)
    right = distribution(logits[0].numpy(), sequence(output=HISTORY, **{"temperature": 1.0} | sampling))
    draws = 4000
    seeds = [
        sequence(f"r{seed}", output=HISTORY, **{"temperature": 1.0, "seed": seed} | sampling)
        for seed in range(draws)
    ]
    counts = np.bincount(choose(logits.expand(draws, -1), seeds), minlength=VOCAB)
    assert not counts[right == 0].any(), "a token that the settings rule out was drawn"
    # Five standard deviations of a count; and what is likely at all does come up.
    assert (np.abs(counts - draws * right) <= 5 * np.sqrt(draws * right * (1 - right)) + 1e-9).all()
    assert (counts[right > 0.01] > 0).all()


@pytest.mark.parametrize("sampling", [each for each in SETTINGS if "temperature" not in each], ids=str)
def test_greedy_takes_the_best_after_penalties(sampling: dict[str, Any]) -> None:
    for seed in range(20):
        logits = random_logits(1, seed)
        greedy = sequence(output=HISTORY, temperature=0.0, **sampling)
        assert choose(logits, [greedy]) == [int(penalised(logits[0].numpy(), greedy).argmax())]


@settings(max_examples=40)
@given(data=st.data())
def test_a_row_is_chosen_as_if_it_were_alone(data: st.DataObject) -> None:
    vocab = data.draw(st.sampled_from([VOCAB, 600, 5000]))
    rows = data.draw(st.integers(1, 8))
    # As the head puts them out: with many equals.
    logits = random_logits(rows, data.draw(st.integers(0, 9)), vocab).bfloat16()
    sequences = [
        sequence(
            f"r{row}", output=HISTORY, logprobs=data.draw(st.sampled_from([None, 2])),
            **{"temperature": data.draw(st.sampled_from([0.0, 0.7, 30.0])), "seed": row}
            | data.draw(st.sampled_from(SETTINGS)),
        )
        for row in range(rows)
    ]  # fmt: skip
    together = sample(scores(logits), range(rows), sequences)
    for row, each in enumerate(sequences):
        assert sample(scores(logits[row : row + 1]), [0], [each]) == [together[row]]


def test_a_filter_finds_its_end_far_down_a_flat_distribution() -> None:
    vocab = 20_000
    logits = torch.linspace(0.01, 0, vocab)[None]
    draws = [sequence(f"r{seed}", temperature=1.0, seed=seed, top_p=0.5) for seed in range(400)]
    found = np.array(choose(logits.expand(400, -1), draws))
    assert found.max() < vocab * 0.51
    assert found.max() > vocab * 0.45
    draws = [sequence(f"r{seed}", temperature=1.0, seed=seed, top_k=7000) for seed in range(400)]
    found = np.array(choose(logits.expand(400, -1), draws))
    assert 6500 < found.max() < 7000


def test_a_seed_gives_the_same_at_the_same_place_and_no_seed_differs_by_request() -> None:
    logits = random_logits(1)
    seeded = [sequence(f"r{i}", temperature=2.0, seed=5) for i in range(30)]
    assert len(set(choose(logits.expand(30, -1), seeded))) == 1
    places = [sequence("r", output=[1] * i, temperature=2.0, seed=5) for i in range(30)]
    assert len(set(choose(logits.expand(30, -1), places))) > 5
    unseeded = [sequence(f"r{i}", temperature=2.0) for i in range(30)]
    assert len(set(choose(logits.expand(30, -1), unseeded))) > 5


@pytest.mark.parametrize("temperature", [1e-40, 1e-6, 1e-3])
def test_the_smallest_temperatures_are_greedy(temperature: float) -> None:
    logits = random_logits(1) * 50
    assert choose(logits, [sequence(temperature=temperature, seed=1)]) == [int(logits.argmax())]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("top_p", [1.0, 0.5])
def test_what_is_not_finite_chooses_nothing_and_harms_no_other(
    bad: float, temperature: float, top_p: float
) -> None:
    logits = random_logits(3)
    rows = [sequence(f"r{i}", temperature=temperature, seed=i, top_p=top_p, logprobs=1) for i in range(3)]
    right = choose(logits, rows)
    logits[1, 7] = bad
    assert choose(logits, rows) == [right[0], -1, right[2]]
    assert sample(scores(logits), range(3), rows)[1].logprobs is None


def test_greedy_tokens_are_the_same_with_logprobs_and_without() -> None:
    logits = random_logits(4)
    for logprobs in (None, 0, 3):
        rows = [sequence(f"r{i}", temperature=0.0, logprobs=logprobs) for i in range(4)]
        assert choose(logits, rows) == logits.argmax(-1).tolist()


def test_logprobs_are_of_the_model_whatever_the_settings() -> None:
    logits = random_logits(2, seed=4)
    right = logits.log_softmax(-1)
    rows = [
        sequence("greedy", temperature=0.0, logprobs=2),
        sequence("drawn", temperature=1.5, seed=3, logprobs=4, presence_penalty=2.0, output=HISTORY, top_k=9),
    ]
    for row, choice in enumerate(sample(scores(logits), range(2), rows)):
        found = choice.logprobs
        assert found is not None
        assert found.token == choice.token
        assert found.logprob == pytest.approx(right[row, choice.token].item(), abs=1e-5)
        assert found.rank == int((right[row] > right[row, choice.token]).sum()) + 1
        best = right[row].argsort(descending=True)[: (2, 4)[row]].tolist()
        assert [token for token, _ in found.top] == best
        assert [value for _, value in found.top] == pytest.approx(right[row, best].tolist(), abs=1e-5)


def test_described_tops_are_cut_to_the_vocabulary_and_to_each_rows_own_wish() -> None:
    logits = random_logits(3, vocab=5)
    described = describe(logits, [0, 1, 2], [0, 2, 50])
    assert [len(each.top) for each in described] == [0, 2, 5]
