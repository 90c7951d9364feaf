"""Tokens to text: exact to the byte, and the same however the tokens are grouped."""

import random
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from onebase_adapters.errors import BaseModelError
from onebase_engine.base.base_spec import DEFAULT_BASE
from onebase_engine.base.catalog import fetch_base
from onebase_engine.text.chat_template import ChatTemplateError
from onebase_engine.text.detokenizer import ByteDetokenizer, Detokenizer, WindowDetokenizer
from onebase_engine.text.stop_strings import OutputText
from onebase_engine.text.tokenizer import TextCodec, load_codec

# The codec is read-only: hypothesis may reuse it between examples.
examples = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


def split(tokens: Sequence[int], seed: int) -> list[Sequence[int]]:
    """Any grouping of the tokens."""
    chance, groups, at = random.Random(seed), [], 0
    while at < len(tokens):
        size = chance.randint(1, 4)
        groups.append(tokens[at : at + size])
        at += size
    return groups


def detokenised(detokenizer: Detokenizer, groups: list[Sequence[int]]) -> str:
    return "".join([detokenizer.push(group) for group in groups]) + detokenizer.flush()


@examples
@given(tokens=st.lists(st.integers(0, 420), max_size=30), seed=st.integers())
def test_any_tokens_decode_as_the_tokenizer_does(codec: TextCodec, tokens: list[int], seed: int) -> None:
    for skip in (True, False):
        text = detokenised(codec.detokenizer((), skip_special=skip), split(tokens, seed))
        assert text == codec.tokenizer.decode(tokens, skip_special_tokens=skip)


@examples
@given(text=texts, seed=st.integers())
def test_text_comes_back(codec: TextCodec, text: str, seed: int) -> None:
    assert detokenised(codec.detokenizer(()), split(codec.encode(text), seed)) == text
    assert codec.decode(codec.encode(text)) == text


def test_characters_are_never_split(codec: TextCodec) -> None:
    detokenizer = codec.detokenizer(())
    assert isinstance(detokenizer, ByteDetokenizer)
    tokens = codec.encode("👩‍👧")
    assert len(tokens) == len("👩‍👧".encode())
    pieces = [detokenizer.push([token]) for token in tokens]
    assert [piece for piece in pieces if piece] == ["👩", "\u200d", "👧"]
    assert detokenizer.flush() == ""


def test_an_incomplete_character_at_the_end(codec: TextCodec) -> None:
    detokenizer = codec.detokenizer(())
    assert detokenizer.push(codec.encode("aé")[:-1]) == "a"
    assert detokenizer.flush() == "\ufffd"


@pytest.fixture(scope="module")
def sentencepiece() -> TextCodec:
    """Llama 2's kind of tokenizer: `▁` for spaces, bytes as `<0xE2>`, a first space that decoding strips."""
    alphabet = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator(["the quick brown fox jumps over a lazy dog, the end"] * 3, trainer)
    tokenizer.add_tokens(alphabet)
    model = tokenizer.model
    vocab = tokenizer.get_vocab()
    assert isinstance(model, models.BPE)
    rebuilt = Tokenizer(models.BPE(vocab, [], byte_fallback=True, unk_token="<unk>"))
    rebuilt.normalizer, rebuilt.pre_tokenizer = tokenizer.normalizer, tokenizer.pre_tokenizer
    rebuilt.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    rebuilt.add_special_tokens(["<s>", "</s>"])
    return TextCodec(rebuilt)


@examples
@given(text=texts, seed=st.integers())
def test_other_tokenizers_decode_by_window(sentencepiece: TextCodec, text: str, seed: int) -> None:
    prompt = sentencepiece.encode("the end")
    tokens = sentencepiece.tokenizer.encode("x" + text, add_special_tokens=False).ids[1:]
    known = sentencepiece.tokenizer.decode(prompt)
    detokenizer = sentencepiece.detokenizer(prompt)
    assert isinstance(detokenizer, WindowDetokenizer)
    assert known + detokenised(detokenizer, split(tokens, seed)) == sentencepiece.tokenizer.decode(prompt + tokens)


def test_a_window_keeps_the_space_after_the_prompt(sentencepiece: TextCodec) -> None:
    fox = sentencepiece.encode("fox")
    assert sentencepiece.detokenizer(sentencepiece.encode("the")).push(fox) == " fox"
    assert sentencepiece.detokenizer(()).push(fox) == "fox"


def test_a_window_does_not_wait_for_ever(sentencepiece: TextCodec) -> None:
    detokenizer = sentencepiece.detokenizer(sentencepiece.encode("the"))
    broken = sentencepiece.tokenizer.token_to_id("<0xFF>")
    shown = "".join([detokenizer.push([broken]) for _ in range(40)])
    assert len(shown) >= 30
    assert len(detokenizer._ids) < 20  # type: ignore[attr-defined]


def test_token_names(codec: TextCodec, sentencepiece: TextCodec) -> None:
    assert codec.token_text(codec.encode("the")[0]) in ("t", "th", "the")
    assert [codec.token_text(token) for token in codec.encode("é")] == ["bytes:\\xc3", "bytes:\\xa9"]
    assert codec.token_text(1) == "<|im_start|>"
    assert codec.token_text(99_999) == ""
    assert sentencepiece.token_bytes(sentencepiece.tokenizer.token_to_id("<0xE2>")) == b"\xe2"
    assert sentencepiece.token_text(sentencepiece.tokenizer.token_to_id("▁the")) == " the"


def expected_cut(text: str, stops: list[str], include: bool) -> str:
    """The definition: read character by character, end at the first stop string that is whole."""
    for end in range(1, len(text) + 1):
        whole = [stop for stop in stops if text[:end].endswith(stop)]
        if whole:
            return text[:end] if include else text[: end - max(map(len, whole))]
    return text


small = st.text("ab", max_size=30)
stop_strings = st.lists(st.text("abc", min_size=1, max_size=4), max_size=3)


@examples
@given(text=small, stops=stop_strings, seed=st.integers(), include=st.booleans())
def test_stop_strings(codec: TextCodec, text: str, stops: list[str], seed: int, include: bool) -> None:
    tokens = codec.encode(text)
    shown, counts = [], []
    for groups in (split(tokens, seed), [[token] for token in tokens], [tokens] if tokens else []):
        output = OutputText(codec.detokenizer(()), stops, include_stop=include)
        parts = []
        for group in groups:
            parts.append(output.push(group))
            if output.stop is not None:
                break
        shown.append("".join(parts) + output.finish())
        counts.append((output.tokens, output.stop))
    assert set(shown) == {expected_cut(text, stops, include)}
    assert len(set(counts)) == 1


def test_only_what_may_begin_a_stop_string_is_held_back(codec: TextCodec) -> None:
    output = OutputText(codec.detokenizer(()), ["STOP"])
    assert output.push(codec.encode("abc S")) == "abc "
    assert output.push(codec.encode("T")) == ""
    assert output.push(codec.encode("x")) == "STx"
    assert output.push(codec.encode("ST")) == ""
    assert output.finish() == "ST"


def test_stop_strings_wait_for_min_tokens(codec: TextCodec) -> None:
    tokens = codec.encode("\t") * 5
    output = OutputText(codec.detokenizer(()), ["\t"], min_tokens=3)
    assert output.push(tokens) == "\t\t\t"
    assert (output.tokens, output.stop) == (4, "\t")


def test_chat_template(codec: TextCodec) -> None:
    rendered = codec.render_chat([{"role": "user", "content": "hi"}])
    assert rendered == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert codec.render_chat([{"role": "user", "content": "hi"}], add_generation_prompt=False).endswith(
        "<|im_end|>\n"
    )
    with pytest.raises(ChatTemplateError, match="system must be first"):
        codec.render_chat([{"role": "user", "content": "hi"}, {"role": "system", "content": "no"}])
    with pytest.raises(ChatTemplateError, match="no chat template"):
        TextCodec(codec.tokenizer).render_chat([])


def test_templates_are_found_where_models_keep_them(codec: TextCodec, tmp_path: Path) -> None:
    codec.tokenizer.save(str(tmp_path / "tokenizer.json"))
    config = tmp_path / "tokenizer_config.json"
    config.write_text('{"chat_template": "one {{ bos_token }}", "bos_token": {"content": "<s>"}}')
    assert load_codec(tmp_path).render_chat([]) == "one <s>"
    config.write_text('{"chat_template": [{"name": "default", "template": "two"}]}')
    assert load_codec(tmp_path).render_chat([]) == "two"
    config.write_text("{")
    with pytest.raises(BaseModelError, match="is not JSON"):
        load_codec(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(BaseModelError, match="Cannot read the tokenizer"):
        load_codec(tmp_path)


@pytest.mark.real
def test_the_real_base_tokenises_and_renders_as_transformers_does() -> None:
    from transformers import AutoTokenizer

    folder = fetch_base(DEFAULT_BASE)
    ours, theirs = load_codec(folder), AutoTokenizer.from_pretrained(folder)
    chat = [{"role": "user", "content": "Où est 東京? 👩‍👧"}, {"role": "assistant", "content": "là"}]
    rendered = theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert ours.render_chat(chat) == rendered
    assert ours.encode(rendered, add_special_tokens=False) == theirs.encode(rendered, add_special_tokens=False)
    tokens = random.Random(0).choices(range(len(theirs)), k=3000)
    for skip in (True, False):
        assert ours.decode(tokens, skip_special=skip) == theirs.decode(tokens, skip_special_tokens=skip)
