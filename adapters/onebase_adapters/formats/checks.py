"""The tokenizer that an adapter may carry: it must be the base's, else the adapter has learned other words.

What counts is which token has which number. Files that say the same in other words are equal.
"""

import logging
import re
from collections.abc import Collection, Mapping
from pathlib import Path

import msgspec

from onebase_adapters.errors import AdapterFormatError, AdapterMismatchError
from onebase_adapters.formats.peft_folder import CONFIG_FILE, WEIGHTS_FILE

log = logging.getLogger(__name__)

_WHOLE = "tokenizer.json"
_ADDED = "added_tokens.json"
_SETTINGS = "tokenizer_config.json"
TOKENIZER_FILES = (_WHOLE, _ADDED, _SETTINGS)


class _Word(msgspec.Struct):
    content: str
    id: int = -1


class _Model(msgspec.Struct):
    vocab: dict[str, int] | list[tuple[str, float]]
    """A Unigram model has pairs of a token and its score, in the order of their ids."""


class _Tokenizer(msgspec.Struct):
    model: _Model
    added_tokens: list[_Word] = []


class _Settings(msgspec.Struct):
    added_tokens_decoder: dict[int, _Word] = {}


def check_vocabulary(files: Mapping[str, bytes], base: Mapping[str, int]) -> None:
    """Refuse tokenizer files (contents by name; others are left out) whose tokens are not those of `base`. Tokens
    behind the base's last one are told and let pass, a `[PAD]` above all: weights for them are refused as such.

    Raises AdapterMismatchError with the first token that differs, or AdapterFormatError (a file that is none).
    """
    own: dict[str, int] = {}
    for name in TOKENIZER_FILES:
        if name in files:
            try:
                own |= _tokens(name, files[name])
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                raise AdapterFormatError(f"{name} is no tokenizer's: {error}", field="path") from error
    end = max(base.values(), default=-1) + 1
    added = [word for word, number in own.items() if word not in base and number >= end]
    if added:
        log.info(
            "the adapter's tokenizer adds %s, which the base never reads nor writes", ", ".join(map(repr, added))
        )
    others = [(number, word) for word, number in own.items() if base.get(word) != number and word not in added]
    if others:
        number, word = min(others)
        has = f"has as {base[word]}" if word in base else "does not have"
        raise AdapterMismatchError(
            f"The adapter's tokenizer is not the base's: its token {number}, {word!r}, the base {has} "
            f"({len(others)} differ). Train with the base's tokenizer: an adapter cannot add tokens.",
            field="path",
        )
    if _WHOLE in files and not own.keys() >= base.keys():
        number, word = min((number, word) for word, number in base.items() if word not in own)
        raise AdapterMismatchError(
            f"The adapter's tokenizer is not the base's: it lacks the base's token {number}, {word!r} "
            f"({len(base.keys() - own.keys())} are missing). Train with the base's tokenizer.",
            field="path",
        )


def check_folder(folder: Path, base: Mapping[str, int]) -> None:
    """`check_vocabulary` of the files in an adapter's folder."""
    paths = [folder / name for name in TOKENIZER_FILES]
    check_vocabulary({path.name: path.read_bytes() for path in paths if path.is_file()}, base)


def _tokens(name: str, content: bytes) -> dict[str, int]:
    """A file's tokens with their numbers."""
    if name == _ADDED:
        return msgspec.json.decode(content, type=dict[str, int])
    if name == _SETTINGS:
        settings = msgspec.json.decode(content, type=_Settings)
        return {word.content: number for number, word in settings.added_tokens_decoder.items()}
    read = msgspec.json.decode(content, type=_Tokenizer)
    words = read.model.vocab
    tokens = words if isinstance(words, dict) else {word: number for number, (word, _) in enumerate(words)}
    return tokens | {word.content: word.id for word in read.added_tokens}


_SHARD = re.compile(rf"{WEIGHTS_FILE.removesuffix('.safetensors')}-\d+-of-(\d+)\.safetensors")
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")


def check_listing(names: Collection[str]) -> tuple[str, ...]:
    """The files that hold the weights: one, or all of its shards. Refuses a folder or an upload by its file names
    alone, by raising AdapterFormatError."""
    if CONFIG_FILE not in names:
        raise AdapterFormatError(f"No {CONFIG_FILE}: this is not a PEFT adapter.", field="path")
    if WEIGHTS_FILE in names:
        return (WEIGHTS_FILE,)
    shards = {name: int(match[1]) for name in sorted(names) if (match := _SHARD.fullmatch(name))}
    if shards:
        if set(shards.values()) != {len(shards)}:
            raise AdapterFormatError(
                f"The weights are in {max(shards.values())} shards, of which {len(shards)} are here.", field="path"
            )
        return tuple(shards)
    pickles = sorted(name for name in names if name.endswith(_PICKLES))
    if pickles:
        raise AdapterFormatError(
            f"{pickles[0]} is a pickle, which can run code when it is read. Save the adapter again with "
            "save_pretrained(..., safe_serialization=True).",
            field="path",
        )
    raise AdapterFormatError(f"No {WEIGHTS_FILE}.", field="path")
