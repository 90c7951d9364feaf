"""Conversations to prompts, by the base's own template or by one that an adapter brings."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from onebase_adapters.errors import BaseModelError, OneBaseError
from onebase_adapters.formats.chat_template import CHAT_TEMPLATE_FILE, template_in


class ChatTemplateError(OneBaseError):
    """There is no chat template, or it refuses these messages."""


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja template."""

    text: str | None
    """None where there is none."""
    special_words: Mapping[str, str] = field(default_factory=dict)
    """`bos_token` and its like, which templates write out."""
    owner: str = "base"

    @cached_property
    def knows_tools(self) -> bool:
        """Whether it shows tools, and turns that call them, by itself."""
        return self.text is not None and re.search(r"\btools\b", self.text) is not None

    @cached_property
    def takes_system(self) -> bool:
        """Whether it writes a system turn's text out."""
        word = "onebase-system"
        try:
            return word in self.render([{"role": "system", "content": word}, {"role": "user", "content": "?"}])
        except ChatTemplateError:
            return False

    def render(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """The prompt of a conversation. Raises ChatTemplateError."""
        # transformers', for its hardening against what a template from a hub may try; imports no torch.
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        if self.text is None:
            raise ChatTemplateError(
                "The base model has no chat template: write the prompt out, and ask for a completion of it."
            )
        try:
            rendered, _ = render_jinja_template(
                [list(messages)],
                chat_template=self.text,
                add_generation_prompt=add_generation_prompt,
                **{**self.special_words, **variables},
            )
        except (TemplateError, TypeError, ValueError, KeyError, IndexError, OverflowError) as error:
            raise ChatTemplateError(
                f"The {self.owner}'s chat template refuses this: {error}", field="messages"
            ) from error
        text: str = rendered[0]
        return text


def _find_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    beside = folder / CHAT_TEMPLATE_FILE
    if beside.is_file():
        return beside.read_text(encoding="utf-8")
    return template_in(config) or template_in(_read_json(folder / "chat_template.json"))


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BaseModelError(f"{path} is not JSON: {error}", field="model") from error
    return value if isinstance(value, dict) else {}
