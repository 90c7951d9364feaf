"""Conversations to prompts, by the base's own template."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from onebase_adapters.errors import BaseModelError, OneBaseError


class ChatTemplateError(OneBaseError):
    """The base has no chat template, or its template refuses these messages."""


def _find_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    beside = folder / "chat_template.jinja"
    if beside.is_file():
        return beside.read_text(encoding="utf-8")
    found = config.get("chat_template") or _read_json(folder / "chat_template.json").get("chat_template")
    if isinstance(found, list):  # several named ones
        named = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else None


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BaseModelError(f"{path} is not JSON: {error}", field="model") from error
    return value if isinstance(value, dict) else {}
