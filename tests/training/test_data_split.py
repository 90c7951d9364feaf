"""The split is deterministic, and holds nothing out that the training part has in other words."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onebase_adapters.errors import DataError
from onebase_training.data import Dataset, Example, Turn, split
from onebase_training.data.duplicates import NEAR, _similarity, groups
from onebase_training.data.words import compared_words


def dataset(*prompts: str, task: str = "") -> Dataset:
    examples = tuple(Example(line, prompt=text, completion=" x", task=task) for line, text in enumerate(prompts, 1))
    return Dataset(examples, "prompt-completion", "memory", "0")


LONG = "the council of the city met on monday to speak about its plans for the old harbour"


def test_groups_are_by_words_not_by_form() -> None:
    texts = ["Hello, World!", "hello world", "Hello there", "好的,谢谢!", "好的 谢谢", "好的再见", "!!!", "???"]
    assert groups(texts) == [0, 0, 2, 3, 3, 5, 6, 7]


def test_a_changed_word_in_a_long_text_is_a_near_duplicate() -> None:
    others = [f"something else, number {number}" for number in range(30)]
    assert groups([LONG, *others, LONG.replace("monday", "friday")]) == [0, *range(1, 31), 0]


def test_a_template_that_all_share_makes_no_duplicates() -> None:
    template = "Below is a headline. Answer with one word whether it is meant seriously. Headline: {} Answer:"
    assert groups([template.format(word) for word in ["red", "green", "blue"]]) == [0, 1, 2]


@given(
    st.lists(st.lists(st.sampled_from("abcdefg"), min_size=1, max_size=7).map(" ".join), min_size=1, max_size=14)
)
def test_groups_equal_those_of_comparing_all_pairs(texts: list[str]) -> None:
    keys = [tuple(compared_words(text)) for text in texts]
    sets = {key: frozenset(key) for key in keys}
    weight = {w: math.log(len(sets) / sum(w in members for members in sets.values())) for key in keys for w in key}
    expected = list(range(len(texts)))
    changed = True
    while changed:
        changed = False
        for i in range(len(texts)):
            for j in range(i):
                near = keys[i] == keys[j] or _similarity(sets[keys[i]], sets[keys[j]], weight) >= NEAR
                if near and expected[i] != expected[j]:
                    old, new = max(expected[i], expected[j]), min(expected[i], expected[j])
                    expected = [new if at == old else at for at in expected]
                    changed = True
    assert groups(texts) == expected


@given(st.lists(st.text("ab 甲乙.", max_size=6), min_size=2, max_size=30), st.integers(0, 99), st.floats(0.05, 0.6))
def test_a_split_is_a_partition_that_no_group_crosses(prompts: list[str], seed: int, fraction: float) -> None:
    data = dataset(*prompts)
    try:
        train, held_out = split(data, eval_fraction=fraction, seed=seed)
    except DataError:
        assert max(map(groups(prompts).count, groups(prompts))) > len(prompts) // 2
        return
    assert (train, held_out) == split(data, eval_fraction=fraction, seed=seed)
    lines = [one.line for one in train.examples + held_out.examples]
    assert sorted(lines) == [one.line for one in data.examples]
    assert train.examples and held_out.examples
    group_of = dict(zip((one.line for one in data.examples), groups(prompts), strict=True))
    assert not {group_of[one.line] for one in train.examples} & {group_of[one.line] for one in held_out.examples}


def test_the_fraction_is_met_and_the_seed_matters() -> None:
    data = dataset(*(f"number {number}" for number in range(200)))
    train, held_out = split(data, eval_fraction=0.1, seed=1)
    assert (len(train), len(held_out)) == (180, 20)
    assert split(data, eval_fraction=0.1, seed=2)[1] != held_out


def test_each_task_is_held_out_in_proportion() -> None:
    small, big = dataset(*(f"p{n}" for n in range(20)), task="a"), dataset(*(f"p{n}" for n in range(100)), task="b")
    held_out = split(replace(small, examples=small.examples + big.examples), eval_fraction=0.1, seed=3)[1]
    assert [one.task for one in held_out.examples].count("a") == 2
    assert len(held_out) == 12


def test_a_group_given_stays_together() -> None:
    data = dataset(*(f"word{n}" for n in range(40)))
    _, held_out = split(data, eval_fraction=0.25, seed=0, group=lambda one: str(one.line % 4))
    assert len({one.line % 4 for one in held_out.examples}) == 1
    assert len(held_out) == 10


def test_what_cannot_be_split_says_so() -> None:
    for prompts in (["one"], ["Same", "same!"], ["same"] * 9 + ["other"]):
        try:
            train, held_out = split(dataset(*prompts), eval_fraction=0.5, seed=0)
        except DataError as error:
            assert error.field == "eval_data"
        else:
            assert (len(train), len(held_out)) == (9, 1)


def test_chats_are_compared_by_what_is_asked() -> None:
    chats = [(Turn("user", "Hi"), Turn("assistant", answer)) for answer in "abc"]
    chats.append((Turn("user", "Bye"), Turn("assistant", "a")))
    data = Dataset(tuple(Example(n, turns) for n, turns in enumerate(chats)), "chat", "m", "0")
    train, held_out = split(data, eval_fraction=0.25, seed=0)
    assert (len(train), len(held_out)) == (3, 1)
    with pytest.raises(DataError):
        split(Dataset(data.examples[:3], "chat", "m", "0"), eval_fraction=0.25, seed=0)
