"""Examples as a hard prompt shows them to the base, and the hard prompt's two files."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from onebase_adapters.format import CONFIG_FILE, WEIGHTS_FILE
from onebase_adapters.primitives import Template
from onebase_training.data import NO_LOSS, Encoded, Example, Turn, encode


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
    """What a client sends, and what is to follow: the template brings all words in between."""
    if example.words:
        return " ".join(example.words), f" {' '.join(example.tags)}"
    if example.label is not None:
        return example.prompt or "", f" {example.label}"
    return example.prompt or "", example.completion or ""


def write_template(template: Template, folder: Path, base: str) -> None:
    """Write the adapter's two files."""
    settings: dict[str, Any] = {
        "peft_type": "TEMPLATE",
        "base_model_name_or_path": base,
        "before": template.before,
        "after": template.after,
        "messages": [dict(turn) for turn in template.messages],
        "stop": list(template.stop),
    }
    (folder / CONFIG_FILE).write_text(json.dumps(settings, indent=2, ensure_ascii=False), encoding="utf-8")
    save_file({}, folder / WEIGHTS_FILE, metadata={"format": "pt"})
