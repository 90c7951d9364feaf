"""Metrics against values computed by hand, and intervals against what theory says of them."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onebase_adapters.errors import DataError
from onebase_training.data import Example, Turn
from onebase_training.data.task_kind import default_metric
from onebase_training.evaluation.metrics import METRICS, difference, perplexity, rouge_l, score, spans


def test_exact_match_and_accuracy() -> None:
    found = score("exact_match", [" yes", "no", "SELECT  1\n", "Yes"], ["yes", "yes", "SELECT 1", "yes"])
    assert (found.metric, found.value, found.examples) == ("exact_match", 0.5, 4)
    assert score("accuracy", ["a", "b", "b"], ["a", "b", "c"]).value == pytest.approx(2 / 3)


def test_macro_f1() -> None:
    # a: 2 hits of 3 predicted and 2 wanted: 4/5. b: 1 of 1 and 3: 2/4. c: never predicted: 0. "x" is no class.
    predictions, references = list("aaabxx"), list("aabbbc")
    assert score("macro_f1", predictions, references).value == pytest.approx((0.8 + 0.5 + 0) / 3)


def test_rouge_l() -> None:
    # Lin 2004: "police kill the gunman" shares "police the gunman" with the reference.
    assert rouge_l("Police kill the gunman.", "police killed the gunman") == pytest.approx(3 / 4)
    assert rouge_l("the gunman kill police", "police killed the gunman") == pytest.approx(2 / 4)
    assert rouge_l("a b c d e", "a c e") == pytest.approx(2 * 3 / 8)
    assert rouge_l("我爱北京", "我爱你,北京") == pytest.approx(2 * 4 / 9)
    assert rouge_l("", "word") == 0.0


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("O O", set()),
        ("", set()),
        ("B-P I-P O B-L", {(0, 2, "P"), (3, 4, "L")}),
        ("B-P B-P", {(0, 1, "P"), (1, 2, "P")}),
        ("I-P I-L I-L", {(0, 1, "P"), (1, 3, "L")}),
        ("B-P E-P S-P S-P", {(0, 2, "P"), (2, 3, "P"), (3, 4, "P")}),
        ("Number Street Street Number", {(0, 1, "Number"), (1, 3, "Street"), (3, 4, "Number")}),
    ],
)
def test_spans(tags: str, expected: set[tuple[int, int, str]]) -> None:
    assert spans(tags.split()) == expected


def test_entity_f1_counts_over_all_examples() -> None:
    # Hits 1 + 0, predicted 2 + 1, wanted 1 + 1.
    found = score("entity_f1", ["B-P O B-L", "B-P B-P"[:3]], ["B-P O O", "B-P I-P"])
    assert found.value == pytest.approx(2 * 1 / (3 + 2))
    assert score("entity_f1", ["O", "O"], ["O", "O"]).value == 1.0


def test_field_f1_compares_objects_by_key_and_value() -> None:
    # Hits 1 + 2, predicted 2 + 2, wanted 2 + 2; then an answer that is no object, with 1 wanted.
    predictions = ['{"a": "x", "b": "z"}', '{"b": {"d": 1, "c": 2}, "a": 1}', '{"a": "x"} and more']
    references = ['{"a": "x", "c": "z"}', '{"a": 1, "b": {"c": 2, "d": 1}}', '{"a": "x"}']
    assert score("field_f1", predictions, references).value == pytest.approx(2 * 3 / (4 + 5))
    assert score("field_f1", ["[1]", "{"], ['{"a": 1}', '{"a": 1}']).value == 0.0


def test_perplexity_is_by_token() -> None:
    found = perplexity([3 * math.log(2), math.log(16)], [3, 1])
    assert found.value == pytest.approx(math.exp(7 * math.log(2) / 4))
    assert found.low == pytest.approx(2)
    assert found.high == pytest.approx(16)


def test_the_interval_of_a_mean_is_the_textbooks() -> None:
    references, predictions = ["yes"] * 400, ["yes"] * 300 + ["no"] * 100
    found = score("accuracy", predictions, references)
    half = 1.96 * math.sqrt(0.75 * 0.25 / 400)
    assert found.low == pytest.approx(0.75 - half, abs=0.006)
    assert found.high == pytest.approx(0.75 + half, abs=0.006)


def test_a_paired_difference_is_surer_than_two_intervals() -> None:
    random = np.random.default_rng(0)
    hard = random.random(300) < 0.5  # the same half is hard for both
    references = ["yes"] * 300
    ours = ["no" if one else "yes" for one in hard]
    others = ["no" if one or place % 20 == 0 else "yes" for place, one in enumerate(hard)]
    found = difference("accuracy", ours, others, references)
    assert 0 < found.low < found.value < found.high
    assert score("accuracy", ours, references).low < score("accuracy", others, references).high
    assert difference("accuracy", ours, ours, references).high == 0.0


def test_the_same_seed_gives_the_same_interval() -> None:
    predictions, references = list("abab"), list("aabb")
    assert score("macro_f1", predictions, references) == score("macro_f1", predictions, references)


@given(
    st.sampled_from(sorted(METRICS)),
    st.lists(
        st.tuples(*[st.sampled_from(["a", "b", "a b", "B-x I-x", "O", "", "好 的"])] * 2), min_size=1, max_size=8
    ),
)
def test_scores_are_fractions_and_perfect_for_the_reference(metric: str, pairs: list[tuple[str, str]]) -> None:
    predictions, references = [mine for mine, _ in pairs], [wanted for _, wanted in pairs]
    found = score(metric, predictions, references)
    assert 0 <= found.low <= found.high <= 1
    assert 0 <= found.value <= 1
    assert score(metric, references, references).value == 1.0


def test_nothing_to_score_is_an_error() -> None:
    for metric in METRICS:
        with pytest.raises(DataError, match="no examples"):
            score(metric, [], [])
    with pytest.raises(ValueError, match="zip"):
        score("accuracy", ["a"], ["a", "b"])


def completions(*texts: str) -> list[Example]:
    return [Example(line, prompt=str(line), completion=text) for line, text in enumerate(texts)]


def test_the_default_metric_fits_the_answers() -> None:
    assert default_metric([Example(1, words=("a",), tags=("O",))]) == "entity_f1"
    assert default_metric([Example(n, prompt="x", label=label) for n, label in enumerate("abc")]) == "accuracy"
    assert default_metric([Example(n, prompt="x", label=label) for n, label in enumerate("aaaab")]) == "macro_f1"
    assert default_metric(completions(*[" yes", " no"] * 20)) == "accuracy"
    assert default_metric(completions("SELECT a FROM t", "SELECT b FROM t", "x")) == "exact_match"
    assert default_metric(completions(' {"a": "x"}', '{"b": "y"}')) == "field_f1"
    assert default_metric(completions('{"a": "x"}', "none")) == "exact_match"
    long = Turn("assistant", "word " * 40)
    assert default_metric([Example(1, (Turn("user", "q"), long)), *completions("x", "a " * 50)]) == "rouge_l"
    assert default_metric(completions("很" * 31)) == "rouge_l"
