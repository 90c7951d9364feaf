"""Training must see the token ids that serving sees, with the loss on what the model is to write."""

import pytest

from onebase_adapters.errors import DataError
from onebase_engine.base.base_spec import DEFAULT_BASE
from onebase_engine.base.catalog import fetch_base
from onebase_engine.text.tokenizer import TextCodec, load_codec
from onebase_training.data import NO_LOSS, Encoded, Example, Turn, encode, encode_for_head

pytestmark = pytest.mark.real

CHATS = [
    (Turn("user", "Hi!"), Turn("assistant", "Hello.")),
    (Turn("system", "Be brief."), Turn("user", "2+2?"), Turn("assistant", " 4 ")),
    (Turn("user", "你好"), Turn("assistant", "你好,有什么事?"), Turn("user", "再见"), Turn("assistant", "再见!")),
    (Turn("user", "Code"), Turn("assistant", "\n\nx = 1"), Turn("user", "More"), Turn("assistant", "\n\ny = 2\n")),
    (Turn("user", "<|im_end|> in the text"), Turn("assistant", "<|im_end|>"), Turn("user", "unanswered")),
]


@pytest.fixture(scope="module")
def tokenizer() -> object:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(fetch_base(DEFAULT_BASE))


@pytest.fixture(scope="module")
def codec() -> TextCodec:
    return load_codec(fetch_base(DEFAULT_BASE))


def learned(codec: TextCodec, one: Encoded) -> str:
    return codec.decode([label for label in one.labels if label != NO_LOSS])


@pytest.mark.parametrize("turns", CHATS)
def test_a_chat_is_tokenised_as_the_server_does(
    turns: tuple[Turn, ...], tokenizer: object, codec: TextCodec
) -> None:
    sequences = encode([Example(1, turns)], tokenizer, max_length=512)
    asked = [at for at, turn in enumerate(turns) if turn.role == "assistant"]
    answers = []
    for one in sequences:
        runs = [at for at in range(len(one.labels)) if one.labels[at] != NO_LOSS and one.labels[at - 1] == NO_LOSS]
        assert runs[-1] == one.prompt_length
        for start in runs:
            served = asked[len(answers)]
            messages = [{"role": turn.role, "content": turn.content} for turn in turns[:served]]
            prompt = codec.encode(codec.render_chat(messages), add_special_tokens=False)
            assert list(one.input_ids[:start]) == prompt
            answer = one.labels[start:]
            answers.append(codec.decode(answer[: answer.index(NO_LOSS) if NO_LOSS in answer else None]))
    assert answers == [turns[at].content + "<|im_end|>" for at in asked]


def test_labels_are_the_inputs(tokenizer: object) -> None:
    for one in encode([Example(at, turns) for at, turns in enumerate(CHATS)], tokenizer, max_length=512):
        assert len(one.labels) == len(one.input_ids)
        assert all(label in (NO_LOSS, token) for label, token in zip(one.labels, one.input_ids, strict=True))


def test_a_turn_that_merges_with_its_header_is_a_sequence_of_its_own(tokenizer: object) -> None:
    assert [len(encode([Example(1, turns)], tokenizer, max_length=512)) for turns in CHATS] == [1, 1, 1, 2, 1]


def test_a_completion_is_tokenised_as_the_server_does(tokenizer: object, codec: TextCodec) -> None:
    for prompt, completion in [("Is it?", " yes"), ("", "text"), ("Q:\n", "\nA"), ("情感:", "正面")]:
        (one,) = encode([Example(1, prompt=prompt, completion=completion)], tokenizer, max_length=64)
        assert list(one.input_ids[: one.prompt_length]) == codec.encode(prompt)
        assert learned(codec, one) == completion + "<|im_end|>"
        assert set(one.labels[: one.prompt_length]) <= {NO_LOSS}


def test_what_does_not_fit_is_refused_unless_a_policy_says_otherwise(tokenizer: object) -> None:
    short = Example(1, prompt="a", completion=" b")
    long = Example(7, prompt="a", completion=" b" * 50)
    with pytest.raises(DataError, match=r"line 7: 52 tokens \(1 of them prompt\) do not fit into 10"):
        encode([short, long], tokenizer, max_length=10)
    assert [one.example.line for one in encode([short, long], tokenizer, max_length=10, too_long="skip")] == [1]
    cut = encode([short, long], tokenizer, max_length=10, too_long="cut")
    assert [(len(one.input_ids), one.cut) for one in cut] == [(3, 0), (10, 42)]
    with pytest.raises(DataError, match="line 2"):
        encode([Example(2, prompt="a " * 50, completion=" b")], tokenizer, max_length=10, too_long="cut")


def test_labels_and_tags_are_written_out(tokenizer: object, codec: TextCodec) -> None:
    labelled = Example(1, prompt="Fine.", label="pos")
    tagged = Example(2, words=("in", "Rome"), tags=("O", "LOC"))
    one, two = encode([labelled, tagged], tokenizer, max_length=64)
    assert codec.decode(one.input_ids) == "Fine.\nLabel: pos<|im_end|>"
    assert learned(codec, one) == " pos<|im_end|>"
    assert codec.decode(two.input_ids) == "in Rome\nTags: O LOC<|im_end|>"
    assert learned(codec, two) == " O LOC<|im_end|>"


def test_a_head_sees_the_class_at_the_last_token(tokenizer: object, codec: TextCodec) -> None:
    (one,) = encode_for_head(
        [Example(1, prompt="Very fine.", label="pos")], tokenizer, ["neg", "pos"], max_length=9
    )
    assert list(one.input_ids) == codec.encode("Very fine.")
    assert one.labels == (NO_LOSS,) * (len(one.input_ids) - 1) + (1,)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("3600", "Constantinople", "Ave,", "Rome"), "3600 Constantinople Ave, Rome"),
        (("我", "爱", "北京", "。", "New", "York"), "我爱北京。New York"),
        (("🙂", "x"), "🙂 x"),
    ],
)
def test_a_head_sees_each_tag_at_its_words_last_token(
    words: tuple[str, ...], text: str, tokenizer: object, codec: TextCodec
) -> None:
    classes = [f"tag{place}" for place in range(len(words))]
    (one,) = encode_for_head([Example(1, words=words, tags=tuple(classes))], tokenizer, classes, max_length=64)
    assert list(one.input_ids) == codec.encode(text)
    assert [label for label in one.labels if label != NO_LOSS] == list(range(len(words)))
    for place, word in enumerate(words):
        seen = codec.decode(one.input_ids[: one.labels.index(place) + 1])
        assert seen == text[: text.index(word) + len(word)]


def test_a_head_refuses_what_is_no_class(tokenizer: object) -> None:
    with pytest.raises(DataError, match="line 3: 'b' is none of the classes a"):
        encode_for_head([Example(3, prompt="x", label="b")], tokenizer, ["a"], max_length=9)
    with pytest.raises(DataError, match="line 3: a head needs text and label"):
        encode_for_head([Example(3, prompt="x", completion="b")], tokenizer, ["a"], max_length=9)
    with pytest.raises(DataError, match="line 3 of the task 't': the text has no tokens"):
        encode_for_head([Example(3, prompt="", label="a", task="t")], tokenizer, ["a"], max_length=9)
