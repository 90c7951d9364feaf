"""Log-probabilities in the shapes of OpenAI's two endpoints."""

import codecs
from collections.abc import Iterable, Sequence
from typing import Any

from onebase_engine.request import TokenLogprobs
from onebase_engine.text.tokenizer import TextCodec

_LOWEST = -9999.0
"""For minus infinity, which JSON does not have (vLLM's value)."""


def for_chat(codec: TextCodec, entries: Iterable[TokenLogprobs], top: int) -> dict[str, Any]:
    """The `logprobs` object of a chat choice."""
    content = []
    for entry in entries:
        alternatives = [_named(codec, token, logprob) for token, logprob in entry.top[:top]]
        content.append({**_named(codec, entry.token, entry.logprob), "top_logprobs": alternatives})
    return {"content": content, "refusal": None}


def _named(codec: TextCodec, token: int, logprob: float) -> dict[str, Any]:
    return {
        "token": codec.token_text(token),
        "logprob": max(logprob, _LOWEST),
        "bytes": list(codec.token_bytes(token)),
    }


class CompletionLogprobs:
    """The `logprobs` objects of one completion choice; knows how far into the text they have got."""

    def __init__(self, codec: TextCodec, top: int) -> None:
        self._codec = codec
        self._top = top
        self._text = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0
        """Characters of the text that are whole."""

    def add(self, tokens: Sequence[int], entries: Sequence[TokenLogprobs | None]) -> dict[str, Any]:
        """The object for the next tokens. An entry is None where there is no probability: the first of a prompt."""
        words, values, tops, offsets = [], [], [], []
        for token, entry in zip(tokens, entries, strict=True):
            word = self._codec.token_text(token)
            words.append(word)
            offsets.append(self._offset)
            self._offset += len(self._text.decode(self._codec.token_bytes(token)))
            values.append(None if entry is None else max(entry.logprob, _LOWEST))
            tops.append(None if entry is None else self._alternatives(entry))
        return {
            "tokens": words,
            "token_logprobs": values,
            "top_logprobs": tops if self._top else None,
            "text_offset": offsets,
        }

    def _alternatives(self, entry: TokenLogprobs) -> dict[str, float]:
        # OpenAI's rule: the n most likely, and the chosen one if it is not among them.
        named = {self._codec.token_text(token): max(value, _LOWEST) for token, value in entry.top[: self._top]}
        named.setdefault(self._codec.token_text(entry.token), max(entry.logprob, _LOWEST))
        return named


def joined(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One completion's `logprobs` object from those of its parts."""
    whole: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for part in parts:
        for key, values in part.items():
            whole[key] = None if values is None else whole[key] + values
    return whole
