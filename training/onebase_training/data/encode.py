"""Examples to token ids and their loss mask: the very ids that the server would see, and no others.

The invariant: up to `prompt_length`, `input_ids` is what the server makes of the same prompt (the rendered chat
without special tokens of the tokenizer's own; a completion's prompt with them). What the model is to write is
tokenised apart, because that is how it will be written: after the prompt's last token, whatever might merge.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from onebase_adapters.errors import DataError
from onebase_training.data.examples import Example, Turn

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


def encode(
    examples: Sequence[Example], tokenizer: Any, *, max_length: int, too_long: TooLong = "error"
) -> list[Encoded]:
    """The sequences of `examples`, in order. Usually one each: see `_chat` for when a chat becomes several.

    An example of more than `max_length` tokens raises DataError with its line, is left out ("skip"), or loses its
    end ("cut"; one whose prompt alone is too long still raises). `tokenizer` is a PreTrainedTokenizerBase.
    """
    return fit(_encode(examples, tokenizer), max_length, too_long)


def fit(sequences: Iterable[Encoded], max_length: int, too_long: TooLong) -> list[Encoded]:
    """`sequences` with the policy `too_long` applied to those of more than `max_length` tokens."""
    fitting: list[Encoded] = []
    for one in sequences:
        excess = len(one.input_ids) - max_length
        if excess <= 0:
            fitting.append(one)
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


def _encode(examples: Sequence[Example], tokenizer: Any) -> Iterator[Encoded]:
    plain = {place: verbalise(example) for place, example in enumerate(examples) if not example.turns}
    # In one call each: the tokenizer then works on all cores.
    prompts = dict(zip(plain, _ids(tokenizer, [prompt for prompt, _ in plain.values()], special=True), strict=True))
    answers = dict(zip(plain, _ids(tokenizer, [answer for _, answer in plain.values()]), strict=True))
    for place, example in enumerate(examples):
        if place in plain:
            ids = (*prompts[place], *answers[place], _end_of_text(tokenizer))
            start = len(prompts[place])
            yield Encoded(ids, (NO_LOSS,) * start + ids[start:], example, start)
        else:
            yield from _chat(example, tokenizer)


def _chat(example: Example, tokenizer: Any) -> list[Encoded]:
    """One sequence with all assistant turns learned, if each earlier turn is, token for token, the beginning of the
    prompt of the last. Where it is not (a template that shows old answers without their reasoning, an answer that
    starts with a newline), that turn becomes a sequence of its own: the server would see it so too.
    """
    sequences: list[tuple[list[int], list[int], int]] = []
    for place in range(len(example.turns) - 1, -1, -1):
        if example.turns[place].role != "assistant":
            continue
        prompt, answer = _answer(example, place, tokenizer)
        turn, start = prompt + answer, len(prompt)
        home = next((labels for ids, labels, _ in sequences if ids[: len(turn)] == turn), None)
        if home is None:
            sequences.append((turn, [NO_LOSS] * start + answer, start))
        else:
            home[start : len(turn)] = answer
    return [Encoded(tuple(ids), tuple(labels), example, start) for ids, labels, start in reversed(sequences)]


def _answer(example: Example, place: int, tokenizer: Any) -> tuple[list[int], list[int]]:
    """Token ids of the prompt that the assistant's turn at `place` answers, and of its answer."""
    prompt = _render(example, example.turns[:place], tokenizer, generate=True)
    whole = _render(example, example.turns[: place + 1], tokenizer, generate=False)
    if not whole.startswith(prompt):
        raise DataError(
            f"{example.place}: the base's chat template does not write the assistant's turn after its own "
            "generation prompt, so it cannot be learned as it would be served. Use prompt and completion."
        )
    prompt_ids, answer = _ids(tokenizer, [prompt, whole[len(prompt) :]])
    # Templates put a newline behind the end-of-turn token, which the model never has to write.
    ends = set(tokenizer.all_special_ids)
    last = next((at for at in range(len(answer) - 1, -1, -1) if answer[at] in ends), None)
    return prompt_ids, [*answer, _end_of_text(tokenizer)] if last is None else answer[: last + 1]


def _render(example: Example, turns: Sequence[Turn], tokenizer: Any, *, generate: bool) -> str:
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        raise DataError("The base has no chat template; use prompt and completion.", field="format")
    messages = [{"role": turn.role, "content": turn.content} for turn in turns]
    try:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate)
    except (TemplateError, TypeError, ValueError, KeyError, IndexError) as error:
        raise DataError(f"{example.place}: the base's chat template refuses this: {error}") from error
    return text


def _ids(tokenizer: Any, texts: Sequence[str], *, special: bool = False) -> list[list[int]]:
    if not texts:
        return []
    ids: list[list[int]] = tokenizer(list(texts), add_special_tokens=special, verbose=False)["input_ids"]
    return ids


def _end_of_text(tokenizer: Any) -> int:
    if tokenizer.eos_token_id is None:
        raise DataError("The base's tokenizer has no end-of-text token: nothing could teach it to stop.")
    end: int = tokenizer.eos_token_id
    return end
