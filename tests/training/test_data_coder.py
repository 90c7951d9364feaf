"""Tokenizers and templates of other families than the default base's."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from onebase_adapters.errors import DataError
from onebase_engine.text.tokenizer import TextCodec
from onebase_server.api.adapters.directory import Target
from onebase_server.api.generation.prompts import render_chat
from onebase_server.api.generation.tools import tools_of
from onebase_server.api.schemas.chat import ChatRequest
from onebase_training.data import NO_LOSS, Encoded, Example, Turn, encode
from onebase_training.data.reading.read_dataset import read_dataset

CHAT = (Turn("user", "ab"), Turn("assistant", "c"), Turn("user", "d"), Turn("assistant", "e"))


def byte_level(template: str | None = None, *, end: str | None = "<eos>") -> Any:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytewise = Tokenizer(models.BPE({char: at for at, char in enumerate(alphabet)}, []))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bytewise.decoder = decoders.ByteLevel()
    bytewise.add_special_tokens([AddedToken(word, special=True) for word in ("<eos>", "<turn>", "<end>")])
    return PreTrainedTokenizerFast(tokenizer_object=bytewise, eos_token=end, chat_template=template)


def parts(one: Encoded, tokenizer: Any) -> tuple[str, str]:
    """The whole, and what is learned of it."""
    return tokenizer.decode(one.input_ids), tokenizer.decode([label for label in one.labels if label != NO_LOSS])


def test_a_turn_ends_with_the_templates_own_token() -> None:
    # As Gemma: the token that ends a turn is special, but is not the one that ends a text.
    template = "{% for m in messages %}<turn>{{ m.role }}:{{ m.content }}<end>\n{% endfor %}"
    template += "{% if add_generation_prompt %}<turn>assistant:{% endif %}"
    (one,) = encode([Example(1, CHAT)], tokenizer := byte_level(template), max_length=99)
    expected = "<turn>user:ab<end>\n<turn>assistant:c<end>\n<turn>user:d<end>\n<turn>assistant:e<end>"
    assert parts(one, tokenizer) == (expected, "c<end>e<end>")


def test_a_template_without_an_end_gets_the_end_of_text() -> None:
    template = "{% for m in messages %}{{ m.role }}:{{ m.content }} {% endfor %}"
    template += "{% if add_generation_prompt %}assistant:{% endif %}"
    first, last = encode([Example(1, CHAT)], tokenizer := byte_level(template), max_length=99)
    assert parts(first, tokenizer) == ("user:ab assistant:c <eos>", "c <eos>")
    assert parts(last, tokenizer) == ("user:ab assistant:c user:d assistant:e <eos>", "e <eos>")


def test_a_template_that_forgets_makes_a_sequence_of_each_turn() -> None:
    # As reasoning models: an old answer stands without what only the last one has.
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}<turn>{% if loop.last %}(thought){% endif %}"
        "{{ m.content }}<end>{% else %}{{ m.content }};{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<turn>{% endif %}"
    )
    first, last = encode([Example(1, CHAT)], tokenizer := byte_level(template), max_length=99)
    assert parts(first, tokenizer) == ("ab;<turn>(thought)c<end>", "(thought)c<end>")
    assert parts(last, tokenizer) == ("ab;<turn>c<end>d;<turn>(thought)e<end>", "(thought)e<end>")


PLAIN = "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}<end>{% endif %}{% endfor %}"


def test_turns_that_say_so_are_read_and_not_learned() -> None:
    chat = (CHAT[0], Turn("assistant", "c", learned=False), *CHAT[2:])
    (one,) = encode([Example(1, chat)], tokenizer := byte_level(PLAIN), max_length=99)
    assert parts(one, tokenizer) == ("abc<end>de<end>", "e<end>")


def test_all_of_a_document_is_learned_in_pieces() -> None:
    text = Example(1, prompt="", completion="abcdefg", document=True)
    pieces = encode([text], tokenizer := byte_level(), max_length=3)
    assert [parts(one, tokenizer) for one in pieces] == [(part, part) for part in ("abc", "def", "g<eos>")]


def test_tools_go_through_the_template() -> None:
    template = "{% if tools %}{{ tools[0].function.name }};{% endif %}" + PLAIN.replace(
        "{{ m.content }}", "{{ m.content }}{% for c in m.tool_calls %}{{ c.function.arguments.place }}{% endfor %}"
    )
    function = {"name": "weather", "arguments": {"place": "Rome"}}
    call = Turn("assistant", "", fields={"tool_calls": [{"type": "function", "function": function}]})
    example = Example(4, (CHAT[0], call), tools=({"type": "function", "function": {"name": "weather"}},))
    (one,) = encode([example], tokenizer := byte_level(template), max_length=99)
    assert parts(one, tokenizer) == ("weather;abRome<end>", "Rome<end>")


def test_tools_are_spelled_out_as_serving_does_where_the_template_shows_none(tmp_path: Path) -> None:
    """The prompt of the last turn is the one that a chat with the same turns and tools sends to the engine."""
    template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}"
        "{% if m.role == 'assistant' %}<end>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    tool = {"type": "function", "function": {"strict": False, "parameters": {"type": "object"}, "name": "weather"}}
    call = {"type": "function", "function": {"name": "weather", "arguments": '{"place": "Rome"}'}}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "weather?"}, {"type": "text", "text": "In Rome."}]},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "1", **call}]},
        {"role": "tool", "tool_call_id": "1", "content": "sun"},
        {"role": "assistant", "content": "It is sunny."},
    ]
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"messages": messages, "tools": [tool]}))
    tokenizer = byte_level(template)
    last = encode(read_dataset(data).examples, tokenizer, max_length=5000)[-1]
    body = ChatRequest.model_validate({"messages": messages[:-1], "tools": [tool]})
    codec = TextCodec(tokenizer.backend_tokenizer, template)
    services: Any = SimpleNamespace(codec=codec)
    prompt = render_chat(
        services,
        Target("base", None),
        body.messages,
        tools=tools_of(body),
        add_generation_prompt=None,
        variables=None,
    )
    assert parts(last, tokenizer)[0] == prompt + "It is sunny.<end>"
    assert '<tool_call>\n{"name": "weather", "arguments": {"place": "Rome"}}\n</tool_call><end>' in prompt


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        (byte_level(), "no chat template; use prompt and completion"),
        (byte_level("{{ raise_exception('never') }}"), "line 4: the base's chat template refuses this: never"),
        (byte_level("{{ messages | length }}{{ add_generation_prompt }}"), "line 4: .* after its own generation"),
        (byte_level("{% for m in messages %}{{ m.content }}{% endfor %}", end=None), "no end-of-text token"),
    ],
)
def test_templates_that_cannot_teach(tokenizer: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        encode([Example(4, CHAT)], tokenizer, max_length=99)


def test_no_space_comes_before_an_answer_that_has_none() -> None:
    # As Llama 2: the tokenizer puts a space before every text; an answer in the middle of one has none.
    vocabulary = {word: at for at, word in enumerate(["<eos>", "▁", "a", "b", "\n", "▁a", "▁b"])}
    pieces = Tokenizer(models.BPE(vocabulary, [("▁", "a"), ("▁", "b")], unk_token="<eos>"))
    pieces.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=pieces, eos_token="<eos>")
    tight, spaced = encode(
        [Example(1, prompt="a", completion="b"), Example(2, prompt="a", completion=" b")], tokenizer, max_length=9
    )
    assert tokenizer.convert_ids_to_tokens(tight.input_ids) == ["▁a", "b", "<eos>"]
    assert tokenizer.convert_ids_to_tokens(spaced.input_ids) == ["▁a", "▁b", "<eos>"]
