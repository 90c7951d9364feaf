"""Texts for classification and tagging heads: the token ids of the text as the server sees it, and class numbers in
place of the next tokens.

One view serves both: a class stands at the last token that has seen what it is about, that is the text's last token
for a text, and each word's last token for tags. In a causal model an earlier one has not seen the rest.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from onebase_adapters.errors import DataError
from onebase_training.data.encoding.encode import NO_LOSS, Encoded, TooLong, fit
from onebase_training.data.examples import Example
from onebase_training.data.words import join_words


def encode_for_head(
    examples: Sequence[Example],
    tokenizer: Any,
    classes: Sequence[str],
    *,
    max_length: int,
    too_long: TooLong = "error",
) -> list[Encoded]:
    """The sequences of text/label and tokens/tags examples: `labels` are places in `classes`, else `NO_LOSS`.

    `prompt_length` is the whole length. Of two words that end in the same token, the later one's tag is learned.
    `tokenizer` is a fast one. Raises DataError (an unknown class, another format, too long) as `encode` does.
    """
    return fit(_encode(examples, tokenizer, {name: at for at, name in enumerate(classes)}), max_length, too_long)


def _encode(examples: Sequence[Example], tokenizer: Any, number: dict[str, int]) -> Iterator[Encoded]:
    for example in examples:
        if example.words:
            text, ends = join_words(example.words)
            names: Sequence[str] = example.tags
        elif example.prompt is not None and example.label is not None:
            text, ends, names = example.prompt, [], [example.label]
        else:
            raise DataError(f"{example.place}: a head needs text and label, or tokens and tags.", field="format")
        if unknown := set(names) - number.keys():
            raise DataError(f"{example.place}: {min(unknown)!r} is none of the classes {', '.join(number)}.")
        tokens = tokenizer(text, return_offsets_mapping=True, verbose=False)
        ids = tokens["input_ids"]
        if not ids:
            raise DataError(f"{example.place}: the text has no tokens.")
        labels = [NO_LOSS] * len(ids)
        for place, name in zip(_last_tokens(tokens["offset_mapping"], ends), names, strict=True):
            labels[place] = number[name]
        yield Encoded(tuple(ids), tuple(labels), example, len(ids))


def _last_tokens(spans: Sequence[tuple[int, int]], ends: Sequence[int]) -> list[int]:
    """The places of the last tokens that have a character before each of `ends`; without any, of all tokens."""
    if not ends:
        return [len(spans) - 1]
    places: list[int] = []
    at = 0
    for end in ends:
        # Special tokens have empty spans; they stand before or behind the text.
        while at + 1 < len(spans) and spans[at + 1][0] < end and spans[at + 1] != (0, 0):
            at += 1
        places.append(at)
    return places
