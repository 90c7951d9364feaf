"""Tokens to text as they come, exact to the byte: a character is given out once all its bytes are here.

Whatever way a stream of tokens is cut into pushes, the joined text is the same.
"""

from codecs import getincrementaldecoder
from collections.abc import Mapping, Sequence
from typing import Protocol

from tokenizers import Tokenizer

_new_utf8_decoder = getincrementaldecoder("utf-8")

_MOST_PENDING = 5
"""A character is at most four bytes, so four tokens: more that still end in U+FFFD are not waiting for the rest."""


class Detokenizer(Protocol):
    """The text of one sequence."""

    def push(self, tokens: Sequence[int]) -> str:
        """The text that these tokens complete."""
        ...

    def flush(self) -> str:
        """Give the rest at the end: U+FFFD for bytes whose character never got whole."""
        ...


class TokenBytes(dict[int, bytes]):
    """Each token's bytes under a byte-level tokenizer, worked out when first met."""

    def __init__(self, tokenizer: Tokenizer, skipped: frozenset[int]) -> None:
        super().__init__(dict.fromkeys(skipped, b""))
        self._tokenizer = tokenizer

    def __missing__(self, token: int) -> bytes:
        # An id past the tokenizer's vocabulary (models pad their embedding) has no text.
        written = self._tokenizer.id_to_token(token) or ""
        try:
            value = bytes([_BYTE_OF[char] for char in written])
        except KeyError:  # an added token, written as itself
            value = written.encode()
        self[token] = value
        return value


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 stands for itself, the other bytes for characters from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()


class ByteDetokenizer:
    """For byte-level tokenizers (GPT-2, Llama 3, Qwen, SmolLM): look up bytes, decode UTF-8 incrementally."""

    __slots__ = ("_bytes", "_decode")

    def __init__(self, token_bytes: Mapping[int, bytes]) -> None:
        self._bytes = token_bytes
        self._decode = _new_utf8_decoder("replace").decode

    def push(self, tokens: Sequence[int]) -> str:
        if len(tokens) == 1:
            return self._decode(self._bytes[tokens[0]])
        return self._decode(b"".join([self._bytes[token] for token in tokens]))

    def flush(self) -> str:
        return self._decode(b"", True)


class WindowDetokenizer:
    """For every other tokenizer: decode the last few tokens with and without the new one, and give the difference.

    It starts from the prompt's last tokens, since some decoders strip a space at the very beginning.
    """

    __slots__ = ("_ids", "_prefix", "_read", "_skip_special", "_tokenizer")

    def __init__(self, tokenizer: Tokenizer, prompt_tail: Sequence[int], skip_special: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._ids = list(prompt_tail)
        self._prefix = 0
        self._read = len(self._ids)

    def push(self, tokens: Sequence[int]) -> str:
        return "".join([self._push_one(token) for token in tokens])

    def _push_one(self, token: int) -> str:
        self._ids.append(token)
        text, known = self._window()
        if len(text) <= known or (text.endswith("\ufffd") and len(self._ids) - self._read < _MOST_PENDING):
            return ""
        self._ids = self._ids[self._read :]
        self._prefix, self._read = 0, len(self._ids)
        return text[known:]

    def flush(self) -> str:
        text, known = self._window()
        return text[known:]

    def _window(self) -> tuple[str, int]:
        decode = self._tokenizer.decode
        known = decode(self._ids[: self._read], skip_special_tokens=self._skip_special)
        return decode(self._ids, skip_special_tokens=self._skip_special), len(known)
