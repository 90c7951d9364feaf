"""Examples to token ids and their loss mask: the very ids that the server would see, and no others.

The invariant: up to `prompt_length`, `input_ids` is what the server makes of the same prompt (the rendered chat
without special tokens of the tokenizer's own; a completion's prompt with them). What the model is to write is
tokenised apart, because that is how it will be written: after the prompt's last token, whatever might merge.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from onebase_adapters.errors import DataError
from onebase_training.data.encoding.chat_coder import Coder
from onebase_training.data.examples import Example

NO_LOSS = -100

TooLong = Literal["error", "skip", "cut"]


@dataclass(frozen=True)
class Encoded:
    """One sequence to train on."""

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    """As `input_ids` where the token is learned, else `NO_LOSS`; not shifted."""
    example: Example
    prompt_length: int
    """Tokens before the (last) completion: what to generate from in evaluation."""
    cut: int = 0
    """Tokens that `too_long="cut"` took off the end."""
    stop: tuple[str, ...] = ()
    """Texts that end what the model writes for it, beside the end of text."""


def encode(
    examples: Sequence[Example], tokenizer: Any, *, max_length: int, too_long: TooLong = "error"
) -> list[Encoded]:
    """The sequences of `examples`, in order. Usually one each: see `_chat` for when a chat becomes several.

    An example of more than `max_length` tokens raises DataError with its line, is left out ("skip"), or loses its
    end ("cut"; one whose prompt alone is too long still raises). `tokenizer` is a PreTrainedTokenizerBase.
    """
    return fit(_encode(examples, Coder(tokenizer)), max_length, too_long)


def encode_whole(examples: Sequence[Example], tokenizer: Any) -> list[Encoded]:
    """As `encode`, of any length."""
    return list(_encode(examples, Coder(tokenizer)))


def fit(sequences: Iterable[Encoded], max_length: int, too_long: TooLong) -> list[Encoded]:
    """`sequences` with the policy `too_long` applied to those of more than `max_length` tokens."""
    fitting: list[Encoded] = []
    for one in sequences:
        excess = len(one.input_ids) - max_length
        if excess <= 0:
            fitting.append(one)
        elif one.example.document:
            for start in range(0, len(one.input_ids), max_length):
                part = slice(start, start + max_length)
                fitting.append(
                    replace(one, input_ids=one.input_ids[part], labels=one.labels[part], prompt_length=0)
                )
        elif too_long == "cut" and one.prompt_length < max_length:
            ids, labels = one.input_ids[:max_length], one.labels[:max_length]
            fitting.append(Encoded(ids, labels, one.example, one.prompt_length, excess))
        elif too_long != "skip":
            raise DataError(
                f"{one.example.place}: {len(one.input_ids)} tokens ({one.prompt_length} of them prompt) do not fit "
                f"into {max_length}. Shorten it, raise the maximum length, or choose to skip or cut.",
                field="max_length",
            )
    return fitting


def verbalise(example: Example) -> tuple[str, str]:
    """An example that is no chat as raw text: the prompt that /v1/completions takes, and what is to follow it.

    A text is followed by its label as a word, tokens by their tags in order: classification and tagging with the
    language model's own head.
    """
    if example.words:
        return f"{' '.join(example.words)}\nTags:", f" {' '.join(example.tags)}"
    if example.prompt is not None and example.label is not None:
        return f"{example.prompt}\nLabel:", f" {example.label}"
    if example.prompt is None or example.completion is None:
        raise DataError(f"{example.place}: it is a chat, and no single prompt with its completion.")
    return example.prompt, example.completion


def _encode(examples: Sequence[Example], coder: Coder) -> Iterator[Encoded]:
    plain = {place: verbalise(example) for place, example in enumerate(examples) if not example.turns}
    # In one call each: the tokenizer then works on all cores.
    prompts = dict(zip(plain, coder.prompts([prompt for prompt, _ in plain.values()]), strict=True))
    answers = dict(zip(plain, coder.answers([answer for _, answer in plain.values()]), strict=True))
    for place, example in enumerate(examples):
        if place in plain:
            ids = (*prompts[place], *answers[place], coder.end_of_text)
            start = len(prompts[place])
            yield Encoded(ids, (NO_LOSS,) * start + ids[start:], example, start)
        else:
            yield from _chat(example, coder)


def _chat(example: Example, coder: Coder) -> list[Encoded]:
    """One sequence with all assistant turns learned, if each earlier turn is, token for token, the beginning of the
    prompt of the last. Where it is not (a template that shows old answers without their reasoning, an answer that
    starts with a newline), that turn becomes a sequence of its own: the server would see it so too.
    """
    sequences: list[tuple[list[int], list[int], int]] = []
    for place in range(len(example.turns) - 1, 0, -1):  # the first turn answers nothing
        if not example.turns[place].answers:
            continue
        prompt, answer = coder.chat_answer(example, place)
        turn, start = prompt + answer, len(prompt)
        home = next((labels for ids, labels, _ in sequences if ids[: len(turn)] == turn), None)
        if home is None:
            sequences.append((turn, [NO_LOSS] * start + answer, start))
        else:
            home[start : len(turn)] = answer
    return [Encoded(tuple(ids), tuple(labels), example, start) for ids, labels, start in reversed(sequences)]
