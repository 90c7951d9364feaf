"""A hard prompt around what a request says: text around a prompt, turns in front of a conversation."""

from collections.abc import Mapping, Sequence
from typing import Any

from onebase_engine.engine_info import TemplateInfo
from onebase_engine.text.tokenizer import TextCodec


def templated(template: TemplateInfo | None, prompt: str) -> str:
    """A prompt's text with the template around it."""
    return prompt if template is None else template.before + prompt + template.after


def templated_tokens(codec: TextCodec, template: TemplateInfo | None, prompt: Sequence[int]) -> list[int]:
    """A prompt's tokens with the template's around them."""
    if template is None:
        return list(prompt)
    before, after = (codec.encode(text, add_special_tokens=False) for text in (template.before, template.after))
    return [*before, *prompt, *after]


def templated_turns(template: TemplateInfo | None, turns: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """A conversation with the template's turns in front."""
    return list(turns) if template is None else one_system_turn([*template.messages, *turns])


def one_system_turn(turns: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """All system texts (the adapter's, the request's, the tools') become one: most chat templates take only one, at
    the beginning."""
    system = [turn["content"] for turn in turns if turn["role"] == "system"]
    rest = [turn for turn in turns if turn["role"] != "system"]
    return [{"role": "system", "content": "\n\n".join(system)}, *rest] if system else rest
