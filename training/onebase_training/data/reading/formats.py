"""Records to examples: the formats, how their columns are recognised, and what is refused."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from onebase_adapters.errors import DataError
from onebase_training.data.examples import Example, Turn
from onebase_training.data.reading import chats
from onebase_training.data.reading.cells import only_key, optional, task, text, written
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
    if "chosen" in record.columns and "rejected" in record.columns:
        raise record.error(
            "preferences (chosen, rejected) cannot be learned. To learn what was chosen, call it completion.",
            field="chosen",
        )
    known = "; ".join(f"{key} ({layout.columns})" for key, layout in FORMATS.items())
    found = ", ".join(map(repr, record.columns)) or "none"
    raise record.error(f"no format has these columns: {found}. The formats are {known}.")


_PROMPTS = ("prompt", "question", "query", "input", "inputs")
_COMPLETIONS = ("completion", "response", "answer", "output", "target", "targets")
_PASSAGES = ("context", "passage")
_TEXTS, _LABELS = ("text", "sentence"), ("label",)
_PAIRS = (
    ("premise", "hypothesis"),
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("text1", "text2"),
)
"""Two texts that are classified together."""
_WORDS, _TAGS = ("tokens", "words"), ("tags", "ner_tags", "pos_tags")


def _prompt_completion(record: Record) -> Example:
    if isinstance(record.value("prompt"), list) and isinstance(record.value("completion"), list):
        return chats.prompt_and_completion(record)
    prompt = text(record, only_key(record, _PROMPTS))
    if passage := optional(record, _PASSAGES):
        prompt = f"{passage}\n\n{prompt}"
    key = only_key(record, _COMPLETIONS)
    completion = written(record, key)
    if any(name in record.columns for name in chats.SYSTEMS):
        turns = [*chats.system(record), Turn("user", prompt), Turn("assistant", completion)]
        return chats.chat(record, turns)
    if not completion:
        raise record.error(f"{key} is empty: there is nothing to learn.", field=key)
    return Example(record.line, prompt=prompt, completion=completion, task=task(record))


def _text_label(record: Record) -> Example:
    key = only_key(record, _LABELS)
    label = _class_name(record, record.value(key), key)
    pair = next((names for names in _PAIRS if all(name in record.columns for name in names)), None)
    prompt = "\n".join(text(record, name) for name in pair or [only_key(record, _TEXTS)])
    return Example(record.line, prompt=prompt, label=label, task=task(record))


def _document(record: Record) -> Example:
    said = text(record, "text")
    if not said:
        raise record.error("text is empty: there is nothing to learn.", field="text")
    return Example(record.line, prompt="", completion=said, document=True, task=task(record))


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
    value = record.value(key)
    items = value.split() if isinstance(value, str) else value  # in CSV: separated by spaces
    if not isinstance(items, list) or not items:
        raise record.error(f"{key} must be a list with something in it.", field=key)
    return items


def _has(*columns: tuple[str, ...]) -> Callable[[Mapping[str, Any]], bool]:
    return lambda found: all(any(name in found for name in names) for names in columns)


def _labelled(found: Mapping[str, Any]) -> bool:
    pairs = any(all(name in found for name in names) for names in _PAIRS)
    return "label" in found and (pairs or any(name in found for name in _TEXTS))


FORMATS: dict[str, Format] = {
    "chat": Format(
        "messages: a list of role, content; system and tools if any", _has(("messages",)), chats.messages
    ),
    "sharegpt": Format(
        "conversations: a list of from, value; system and tools if any", _has(chats.CONVERSATIONS), chats.sharegpt
    ),
    "instruction": Format(
        "instruction, input or context if any, output; system and history if any",
        _has(("instruction",), chats.OUTPUTS),
        chats.instruction,
    ),
    "tokens-tags": Format("tokens, tags", _has(_WORDS, _TAGS), _tokens_tags),
    "prompt-completion": Format(
        "prompt, completion; context and system if any", _has(_PROMPTS, _COMPLETIONS), _prompt_completion
    ),
    "text-label": Format("text, label; or premise, hypothesis, label and the like", _labelled, _text_label),
    "text": Format("text alone, all of which is learned", _has(("text",)), _document),
}
"""In the order in which they are tried."""
