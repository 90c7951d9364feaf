"""Examples as a hard prompt shows them to the base, and the hard prompt's two files."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from onebase_adapters.primitives.instruction_set import Template
from onebase_training.data import NO_LOSS, Encoded, Example, Turn
from onebase_training.data.encoding.encode import encode


def encode_with(
    template: Template, examples: Sequence[Example], tokenizer: Any, limit: int
) -> list[Encoded] | None:
    """Token ids of the examples as the template shows them; None where one has more than `limit` of them. Only what
    each example has to say itself is learned, not the answers that the template shows; where the template ends an
    answer by a text, that text stands for the end."""
    found = []
    for example in examples:
        *_, whole = encode([_shown(template, example)], tokenizer, max_length=10**9)
        if len(whole.input_ids) > limit:
            return None
        if template.stop and not example.turns:
            whole = replace(whole, labels=(*whole.labels[:-1], NO_LOSS))
        (own,) = encode([example], tokenizer, max_length=10**9)[-1:] if example.turns else [whole]
        said = sum(label != NO_LOSS for label in own.labels)
        places = [at for at, label in enumerate(whole.labels) if label != NO_LOSS][-said:]
        labels = tuple(label if at >= places[0] else NO_LOSS for at, label in enumerate(whole.labels))
        found.append(replace(whole, labels=labels, example=example, stop=template.stop))
    return found


def _shown(template: Template, example: Example) -> Example:
    if example.turns:
        turns = (Turn(turn["role"], turn["content"]) for turn in template.messages)
        return replace(example, turns=(*turns, *example.turns))
    prompt, completion = raw(example)
    asked = f"{template.before}{prompt}{template.after}"
    return Example(
        example.line, prompt=asked, completion=completion + "".join(template.stop[:1]), task=example.task
    )


def raw(example: Example) -> tuple[str, str]:
    """Return the text that a client sends, and the one to follow: the template brings all words in between."""
    if example.words:
        return " ".join(example.words), f" {' '.join(example.tags)}"
    if example.label is not None:
        return example.prompt or "", f" {example.label}"
    return example.prompt or "", example.completion or ""
