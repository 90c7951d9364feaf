"""A model card as hubs read it: what a result is, what it learned from, how it did, and how it is asked. Its facts
are those of `onebase.json`; of an adapter that has none, only the base is known."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from onebase_adapters.errors import ConfigError

CARD_FILE = "README.md"
Library = Literal["peft", "transformers", "gguf"]


def card_of(output: Path) -> Path:
    """Where the card of a folder, or of a single file, stands."""
    return output.with_name(f"{output.name}.md") if output.suffix == ".gguf" else output / CARD_FILE


def check_free(output: Path) -> None:
    """Raises ConfigError where there is something already."""
    for path in (output, card_of(output)):
        if path.exists():
            raise ConfigError(f"{path} exists. Choose another output.", field="output")


@dataclass(frozen=True)
class Card:
    """All that a card says."""

    name: str
    base: str
    """The hub id of the base, where there is one."""
    library: Library
    relation: Literal["adapter", "merge", "finetune"]
    """To the base, in the hub's words."""
    about: str
    """A sentence or two."""
    commands: Sequence[str]
    """Ways to ask it."""
    notes: Mapping[str, Any] = field(default_factory=dict)
    """The contents of `onebase.json`."""


def render_card(card: Card) -> str:
    """Markdown behind a header of YAML, which JSON's values are as well."""
    method, data, metrics = card.notes.get("method"), _object(card.notes, "data"), _object(card.notes, "metrics")
    header = {
        "base_model": card.base,
        "base_model_relation": card.relation,
        "library_name": card.library,
        "tags": ["onebase", *([method] if method else [])],
    }
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in header.items()), "---", ""]
    lines += [f"# {card.name}", "", card.about, ""]
    before, after = _object(metrics, "before"), _object(metrics, "after")
    if after:
        lines += ["| held out | before | after |", "|---|---|---|"]
        lines += [f"| {mark} | {_number(before.get(mark))} | {_number(value)} |" for mark, value in after.items()]
        lines += [""]
    if data:
        lines += [
            f"Trained on {data.get('examples')} examples and measured on {data.get('held_out_examples')}, of the "
            f"format {data.get('format')}. SHA-256 of the data: {data.get('train')}.",
            "",
        ]
    lines += ["```console", *(f"$ {command}" for command in card.commands), "```", ""]
    if data:
        lines += ["It is asked as its data asked it: `onebase data check` shows the very tokens.", ""]
    return "\n".join(lines)


def _object(notes: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """One of the notes; anyone may have written them."""
    found = notes.get(name)
    return found if isinstance(found, dict) else {}


def _number(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else ""
