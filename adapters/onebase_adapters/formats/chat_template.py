"""Where models and adapters keep their chat template."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from onebase_adapters.errors import AdapterFormatError
from onebase_adapters.formats.peft_folder import read_object

CHAT_TEMPLATE_FILE = "chat_template.jinja"
SETTINGS_FILE = "tokenizer_config.json"
"""It may be in there, too."""


def template_in(settings: Mapping[str, Any]) -> str | None:
    """From a tokenizer's settings: one, or the default of several that have names."""
    found = settings.get("chat_template")
    if isinstance(found, list):
        named = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else None


def read_chat_template(folder: Path) -> str | None:
    """An adapter's own, if it brings one. Raises AdapterFormatError."""
    beside = folder / CHAT_TEMPLATE_FILE
    if not beside.is_file():
        return template_in(read_object(folder / SETTINGS_FILE))
    try:
        return beside.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise AdapterFormatError(f"{CHAT_TEMPLATE_FILE} is no text in UTF-8: {error}.", field="path") from error
