"""Records to examples: the formats, how their columns are recognised, and what is refused."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from onebase_adapters.errors import DataError
from onebase_training.data.examples import Example
from onebase_training.data.reading import chats
from onebase_training.data.reading.cells import only_key, task, text
from onebase_training.data.reading.text_files import Record


@dataclass(frozen=True)
class Format:
    """One layout of columns."""

    columns: str
    """For people."""
    fits: Callable[[Mapping[str, Any]], bool]
    convert: Callable[[Record], Example]


def recognise(record: Record, name: str | None = None) -> str:
    """The name of the format of `record`, or `name` if that is a format. Raises DataError."""
    if name is not None:
        if name not in FORMATS:
            raise DataError(f"No format {name!r}; there are {', '.join(FORMATS)}.", field="format")
        return name
    for candidate, layout in FORMATS.items():
        if layout.fits(record.columns):
            return candidate
    known = "; ".join(f"{key} ({layout.columns})" for key, layout in FORMATS.items())
    found = ", ".join(map(repr, record.columns)) or "none"
    raise record.error(f"no format has these columns: {found}. The formats are {known}.")


_PROMPTS, _COMPLETIONS = ("prompt", "question"), ("completion", "response", "answer")
_TEXTS, _LABELS = ("text", "sentence"), ("label",)
_WORDS, _TAGS = ("tokens", "words"), ("tags", "ner_tags", "pos_tags")


def _prompt_completion(record: Record) -> Example:
    prompt = text(record, only_key(record, _PROMPTS))
    key = only_key(record, _COMPLETIONS)
    completion = text(record, key)
    if not completion:
        raise record.error(f"{key} is empty: there is nothing to learn.", field=key)
    return Example(record.line, prompt=prompt, completion=completion, task=task(record))


def _text_label(record: Record) -> Example:
    key = only_key(record, _LABELS)
    label = _class_name(record, record.columns.get(key), key)
    return Example(record.line, prompt=text(record, only_key(record, _TEXTS)), label=label, task=task(record))


def _tokens_tags(record: Record) -> Example:
    words_key, tags_key = only_key(record, _WORDS), only_key(record, _TAGS)
    words = tuple(_class_name(record, word, words_key) for word in _items(record, words_key))
    tags = tuple(_class_name(record, tag, tags_key) for tag in _items(record, tags_key))
    if len(words) != len(tags):
        raise record.error(f"{len(words)} {words_key}, but {len(tags)} {tags_key}.", field=tags_key)
    return Example(record.line, words=words, tags=tags, task=task(record))


def _class_name(record: Record, value: Any, key: str) -> str:
    named = str(value) if isinstance(value, bool | int) else text(record, key, value)
    if not named.strip():
        raise record.error(f"{key} holds an empty one.", field=key)
    return named


def _items(record: Record, key: str) -> list[Any]:
    value = record.columns.get(key)
    items = value.split() if isinstance(value, str) else value  # in CSV: separated by spaces
    if not isinstance(items, list) or not items:
        raise record.error(f"{key} must be a list with something in it.", field=key)
    return items


def _has(*columns: tuple[str, ...]) -> Callable[[Mapping[str, Any]], bool]:
    return lambda found: all(any(name in found for name in names) for names in columns)


FORMATS: dict[str, Format] = {
    "chat": Format("messages: a list of role, content", _has(("messages",)), chats.messages),
    "sharegpt": Format("conversations: a list of from, value", _has(("conversations",)), chats.sharegpt),
    "instruction": Format(
        "instruction, input if any, output",
        _has(("instruction",), chats.OUTPUTS),
        chats.instruction,
    ),
    "tokens-tags": Format("tokens, tags", _has(_WORDS, _TAGS), _tokens_tags),
    "prompt-completion": Format("prompt, completion", _has(_PROMPTS, _COMPLETIONS), _prompt_completion),
    "text-label": Format("text, label", _has(_TEXTS, _LABELS), _text_label),
}
"""In the order in which they are tried."""
