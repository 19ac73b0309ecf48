"""A configuration as the text of a file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from stationmaster.service.config_rules import Secret, Url, is_secret_name, toml_key, toml_text
from stationmaster.service.config_schema import TABLES

if TYPE_CHECKING:
    from collections.abc import Iterator

    from stationmaster.service.config import Config
    from stationmaster.service.config_schema import Table


def render(config: Config) -> str:
    """Return the configuration in effect as TOML that loads again; of a secret only that it is set."""
    lines: list[str] = []
    for name, described in TABLES.items():
        tables = getattr(config, name)
        if described.is_repeated:
            for table in tables:
                lines += [f"[[{name}]]", *_render_table(described, table), ""]
        elif tables is not None:
            lines += [f"[{name}]", *_render_table(described, tables), ""]
    return "\n".join(lines)


def _render_table(described: Table, table: object) -> Iterator[str]:
    for key, declared in described.keys.items():
        value = getattr(table, key)
        if isinstance(value, Secret):
            yield f"# {key} is set, and hidden"
            continue
        if isinstance(value, Mapping):
            value, hidden = _without_secrets(value, toml_key(key))
            yield from (f"# {option} is set, and hidden" for option in hidden)
        query = ""
        if declared.kind == Url and value is not None:
            value, query, _ = value.partition("?")
        if value is not None:
            yield f"{key} = {toml_text(value)}"
        if query:
            yield f"# the query of {key} is set, and hidden"


def _without_secrets(options: Mapping[str, Any], path: str) -> tuple[dict[str, Any], list[str]]:
    """Leave out what has a secret's name, at any depth; return the rest, and the paths of what was left out."""
    shown: dict[str, Any] = {}
    hidden: list[str] = []
    for name, value in options.items():
        here = f"{path}.{toml_key(name)}"
        if is_secret_name(name):
            hidden.append(here)
        elif isinstance(value, Mapping):
            shown[name], below = _without_secrets(value, here)
            hidden += below
        else:
            shown[name] = value
    return shown, hidden
