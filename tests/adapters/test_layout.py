"""Virtual tokens stand where their places say, each once, and leave the prompt's own tokens in order."""

from hypothesis import given
from hypothesis import strategies as st

from onebase_adapters.primitives.virtual_tokens import NO_LAYOUT, Layout

VOCAB = 100
prompts = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=12)
layouts = st.builds(Layout, st.integers(0, 5), st.lists(st.integers(-1, 15), max_size=6).map(tuple))


@given(layouts, prompts)
def test_each_token_once_and_in_order(layout: Layout, prompt: list[int]) -> None:
    tokens = layout.arrange(prompt, VOCAB)
    assert [token for token in tokens if token < VOCAB] == prompt
    assert sorted(token - VOCAB for token in tokens if token >= VOCAB) == list(range(layout.tokens))
    assert tokens[: layout.prefix] == list(range(VOCAB, VOCAB + layout.prefix))


@given(layouts, prompts)
def test_places(layout: Layout, prompt: list[int]) -> None:
    tokens = layout.arrange(prompt, VOCAB)
    for number, place in enumerate(layout.places):
        at = tokens.index(VOCAB + layout.prefix + number)
        own_before = sum(token < VOCAB for token in tokens[:at])
        assert own_before == (len(prompt) if place < 0 else min(place, len(prompt)))


def test_examples() -> None:
    assert Layout(places=(0, 0)).arrange([7, 8], VOCAB) == [100, 101, 7, 8]
    assert Layout(places=(0, 1, -1)).arrange([7, 8], VOCAB) == [100, 7, 101, 8, 102]
    assert Layout(2, (1,)).arrange([7, 8], VOCAB) == [100, 101, 7, 102, 8]
    assert NO_LAYOUT.arrange([7], VOCAB) == [7]
