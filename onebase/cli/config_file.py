"""`--config FILE`: options from the table of a TOML file that is named as the command; and `onebase config`, which
shows what a command line, the environment and such a file come to.

A command line goes before the environment (`ONEBASE_SERVE_PORT`), that before the file, and that before defaults.
"""

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import typer

from onebase_adapters.errors import ConfigError, did_you_mean

_SECRET = ("admin_key", "api_key")


def _read(context: typer.Context, file: Path | None) -> Path | None:
    if file is None or context.resilient_parsing:
        return file
    try:
        tables = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--config {file} cannot be read: {error.strerror or error}.", field="config") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not TOML: {error}", field="config") from error
    command = context.info_name or ""
    group = context.parent.command if context.parent is not None else None
    commands = list(getattr(group, "commands", {}))
    for name, table in tables.items():
        if name not in commands or not isinstance(table, dict):
            raise ConfigError(
                f"{file}: {name!r} is no command's table{did_you_mean(name, commands)}. Options stand below the "
                f"name of their command, as in [{command}].",
                field="config",
            )
    options = get_type_hints(context.command.callback)
    for name in ("config_file", "return"):
        options.pop(name, None)
    context.default_map = {
        name: _value(f"{file}: {command}.{key}", options[name], value)
        for key, value in tables.get(command, {}).items()
        if (name := _known(file, command, key, options))
    }
    return file


ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="FILE",
        is_eager=True,
        callback=_read,
        show_envvar=False,
        rich_help_panel="Configuration and output",
        help="Read options from the table of this TOML file that is named as the command. They can also be set as "
        "ONEBASE_, the command's name, _ and the option's, e.g. ONEBASE_SERVE_PORT.",
    ),
]


def _known(file: Path, command: str, key: str, options: Mapping[str, Any]) -> str:
    name = key.replace("-", "_")
    if name not in options:
        raise ConfigError(f"{file}: {command} has no option {key!r}{did_you_mean(name, options)}.", field=key)
    return name


def _value(where: str, hint: Any, value: Any) -> Any:
    """As the option would read it from a command line. Raises ConfigError."""
    if get_origin(hint) in (Union, UnionType):
        (hint,) = (one for one in get_args(hint) if one is not NoneType)
    if get_origin(hint) is list:
        return [_value(where, get_args(hint)[0], one) for one in (value if isinstance(value, list) else [value])]
    if hint is str and isinstance(value, dict):
        return ",".join(f"{key}={one}" for key, one in value.items())
    if hint is str and isinstance(value, list):
        return ",".join(map(str, value))
    wanted: tuple[type, ...] = {int: (int,), float: (int, float), bool: (bool,)}.get(hint, (str,))
    if not isinstance(value, wanted) or (isinstance(value, bool) and bool not in wanted):
        names = " or ".join(kind.__name__ for kind in wanted)
        raise ConfigError(f"{where} is {value!r}, and must be {names}.", field=where)
    return value


def config(
    context: typer.Context,
    command: Annotated[str, typer.Argument(help="The command, e.g. serve or train.")],
) -> None:
    """Show what a command's options come to, and where each is from: `onebase config serve --port 9000`.

    The output is a file for --config.
    """
    group: Any = context.parent.command if context.parent is not None else None
    if command not in group.commands:
        nearest = did_you_mean(command, group.commands)
        raise ConfigError(f"There is no command {command!r}{nearest}.", field="command")
    chosen = group.commands[command]
    for option in chosen.params:
        option.required = False
    resolved = chosen.make_context(command, list(context.args), parent=context.parent)
    print(f"[{command}]")
    for option in chosen.params:
        value = resolved.params.get(option.name)
        if option.name in ("config_file", "help"):
            continue
        source = resolved.get_parameter_source(option.name)
        origin = {"COMMANDLINE": "command line", "DEFAULT_MAP": "file"}.get(source.name, source.name.lower())
        if option.name in _SECRET and value:
            print(f"# {option.name} is set ({origin})")
        elif value is None or value == () or value == []:
            print(f"# {option.name} =  ({origin})")
        else:
            print(f"{option.name} = {_toml(value)}  # {origin}")


def _toml(value: Any) -> str:
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, bool | int | float):
        return json.dumps(value)
    return json.dumps(str(value), ensure_ascii=False)
