"""A tokenizer written into a GGUF file, and whether the file says the same: a tokenizer that has no name there, or
that comes back as another one, is refused by name, since a wrong one would only show in worse answers."""

import json
import re
from typing import Any

from gguf import GGUFWriter, TokenType

from onebase_adapters.errors import BaseModelError
from onebase_engine.base.gguf_tokenizer import SPLITTINGS, name_of_splitting

_TEXTS = (
    "The quick brown fox can't jump over 13 lazy dogs; they'll've 3.14159, 1,234,567 and 0x1F reasons.",
    "1 12 123 1234 12345   42\n  7\t99 ²³ ½ ٣٤",
    "  two spaces,    four,\ttabs\t\tand\n\n\n   lines \r\n end  ",
    "我想在apple工作1314151天～ 東京タワー 안녕하세요 สวัสดี",
    "🚀 😶\u200d🌫️ ✅🦙🦙 naïve café Ærøskøbing Привет, мир! العربية",
    "def f(x: int) -> str:\n    return f'{x!r:>10}'  # ok\n\nfor i in range(0x10):\n\tprint(i ** 2)\n",
    "<html>&amp;</html> SELECT * FROM t WHERE a<=5 AND b!='';-- ''''''```````\"\"\"\"",
    "ALLCAPS MixedCase snake_case https://example.org/a?b=c#d user@example.org",
    " leading",
    "trailing ",
    "",
)
"""Where tokenizers differ: numbers, spaces, scripts without spaces, emoji, code."""
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_SPACE = "▁"


def add_tokenizer(writer: GGUFWriter, tokenizer: Any, rows: int) -> None:
    """Write a tokenizer of transformers, filled up to `rows` tokens. Raises BaseModelError."""
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    model = described["model"]
    if model["type"] != "BPE":
        raise _nameless(f"is of the kind {model['type']}")
    tokens = [f"[PAD{number}]" for number in range(rows)]
    types = [TokenType.UNUSED] * rows
    words = {number: token for token, number in model["vocab"].items()}
    added = {one["id"]: one for one in described["added_tokens"]}
    if max(words.keys() | added.keys()) >= rows:
        raise _nameless(f"has tokens beyond the {rows} of the model's embedding")
    for number, token in words.items():
        tokens[number], types[number] = token, TokenType.NORMAL
    for number, one in added.items():
        tokens[number] = one["content"]
        types[number] = TokenType.CONTROL if one["special"] else TokenType.USER_DEFINED
    if model.get("byte_fallback"):
        _add_sentencepiece(writer, described, tokens, types)
    else:
        _add_byte_level(writer, tokenizer, model, tokens, types)
    for name in ("bos", "eos", "unk", "pad"):
        if (token_id := getattr(tokenizer, f"{name}_token_id")) is not None and token_id < rows:
            getattr(writer, f"add_{name}_token_id")(token_id)
    first, last = _put_around(tokenizer)
    writer.add_add_bos_token(first)
    writer.add_add_eos_token(last)
    if isinstance(tokenizer.chat_template, dict):
        writer.add_chat_template(
            [{"name": name, "template": text} for name, text in tokenizer.chat_template.items()]
        )
    elif tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def check_tokenizer(wanted: Any, found: Any) -> None:
    """Compare token ids and texts of what was written and what was read back. Raises BaseModelError."""
    added = [str(token) for token in wanted.added_tokens_decoder.values()]
    for text in (*_TEXTS, "".join(f"a{token} b{token}" for token in added)):
        for special in (True, False):
            before, after = (one(text, add_special_tokens=special)["input_ids"] for one in (wanted, found))
            if before != after:
                raise _nameless(f"comes back as another one: {text!r} was {before[:40]}, and is {after[:40]}")
        if wanted.decode(before) != found.decode(before):
            raise _nameless(f"comes back as another one: it decodes {text!r} otherwise")
    if wanted.chat_template != found.chat_template:
        raise _nameless("comes back with another chat template")


def _add_byte_level(
    writer: GGUFWriter, tokenizer: Any, model: dict[str, Any], tokens: list[str], types: list[TokenType]
) -> None:
    name = name_of_splitting(tokenizer)
    if name is None:
        raise _nameless(f"splits text in a way that has no name here ({', '.join(SPLITTINGS)} have)")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(name)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([_pair(merge) for merge in model["merges"]])


def _pair(merge: Any) -> str:
    return merge if isinstance(merge, str) else " ".join(merge)


def _add_sentencepiece(
    writer: GGUFWriter, described: dict[str, Any], tokens: list[str], types: list[TokenType]
) -> None:
    """SentencePiece has a score for each token in place of merges: the token that scores most is merged first."""
    scores = [-1e9] * len(tokens)
    numbers = described["model"]["vocab"]
    for rank, merge in enumerate(described["model"]["merges"]):
        number = numbers["".join(merge.split(" ") if isinstance(merge, str) else merge)]
        scores[number] = max(scores[number], float(-rank))
    for number, token in enumerate(tokens):
        if types[number] == TokenType.USER_DEFINED:
            tokens[number] = token.replace(_SPACE, " ")  # llama.cpp looks for these in the text itself
        elif _BYTE.fullmatch(token):
            types[number] = TokenType.BYTE
    unknown = described["model"].get("unk_token")
    if unknown in numbers:
        types[numbers[unknown]] = TokenType.UNKNOWN
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    writer.add_add_space_prefix(_begins_with_space(described))


def _begins_with_space(described: dict[str, Any]) -> bool:
    """Whether a text begins with a space that is not in it."""
    normalizer, splitting = described.get("normalizer") or {}, described.get("pre_tokenizer") or {}
    steps = normalizer.get("normalizers", [normalizer])
    return any(step.get("type") == "Prepend" for step in steps) or splitting.get("prepend_scheme") in (
        "always",
        "first",
    )


def _put_around(tokenizer: Any) -> tuple[bool, bool]:
    """Whether a text gets the first and the last token."""
    bare, whole = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    first, last = tokenizer.bos_token_id, tokenizer.eos_token_id
    for begins in (False, True):
        for ends in (False, True):
            if whole == [first] * begins + bare + [last] * ends:
                return begins, ends
    raise _nameless("puts other tokens than its first and its last one around a text")


def _nameless(how: str) -> BaseModelError:
    return BaseModelError(
        f"The base's tokenizer {how}: a GGUF file cannot hold it. `--to transformers` writes the model with it.",
        field="to",
    )
