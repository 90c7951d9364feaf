"""Words and their spaces: Chinese and Japanese are written without."""

import re
import unicodedata
from collections.abc import Sequence

UNSPACED = r"\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
"""Kana and Han characters, for use inside the brackets of a regular expression."""

_WORD = re.compile(rf"([{UNSPACED}]+)|([^\W{UNSPACED}]+)")
_TIGHT = re.compile(rf"[{UNSPACED}\u3000-\u303f\uff00-\uff65]")


def join_words(words: Sequence[str]) -> tuple[str, list[int]]:
    """The text of `words`, with spaces except beside Chinese or Japanese, and where in it each word ends."""
    text, ends = "", []
    for word in words:
        tight = not text or not word or _TIGHT.match(text[-1]) or _TIGHT.match(word)
        text += word if tight else f" {word}"
        ends.append(len(text))
    return text, ends


def compared_words(text: str, *, unspaced: int = 2) -> list[str]:
    """The words of `text` for comparisons: no case, no punctuation, no width.

    Unspaced writing comes as overlapping runs of `unspaced` characters. A text of nothing else is one word.
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    words: list[str] = []
    for run, word in _WORD.findall(folded):
        words += [word] if word else [run[at : at + unspaced] for at in range(max(1, len(run) - unspaced + 1))]
    return words or [folded]
