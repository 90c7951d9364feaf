"""Settings as they are written down: on a command line, in a file, or in a job's order. One reading for all."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from onebase_adapters.errors import ConfigError
from onebase_contract.settings import TrainConfig

FORMS: Mapping[Any, str] = {
    tuple[str, ...]: "NAME,...",
    tuple[int, ...]: "INTEGER,...",
    Mapping[str, int]: "NAME=INTEGER,...",
    Mapping[str, float]: "NAME=NUMBER,...",
    Mapping[str, str]: "NAME=TEXT,...",
}
"""How values of these types are written."""
HINTS: Mapping[str, Any] = get_type_hints(TrainConfig)
_PATHS = {name for name, hint in HINTS.items() if Path in (hint, *get_args(hint))}
_FORMED = {name for name, hint in HINTS.items() if hint in FORMS}


def read_settings(values: Mapping[str, Any]) -> TrainConfig:
    """The configuration of `values` by the names of its fields, lists and mappings as texts. Raises ConfigError."""
    if unknown := values.keys() - HINTS.keys():
        raise ConfigError(f"There is no setting {min(unknown)!r}.", field=min(unknown))
    return TrainConfig(**{name: _read(name, value) for name, value in values.items()})


def _read(name: str, value: Any) -> Any:
    if name in _PATHS:
        return tuple(map(Path, value)) if isinstance(value, list | tuple) else Path(value)
    if name not in _FORMED:
        return value
    types = get_args(HINTS[name])
    parts = [part.strip() for part in value.split(",") if part.strip()]
    try:
        if get_origin(HINTS[name]) is tuple:
            return tuple(types[0](part) for part in parts)
        return {key: types[1](text) for key, text in map(_pair, parts)}
    except ValueError as error:
        raise ConfigError(f"{name} must read {FORMS[HINTS[name]]}, found {value!r}.", field=name) from error


def _pair(part: str) -> tuple[str, str]:
    key, _, text = part.partition("=")
    if not key or not text:
        raise ValueError(part)
    return key, text
