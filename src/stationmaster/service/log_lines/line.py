"""A line of the log, and what is cut short in it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

import attrs

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

Level: TypeAlias = Literal["debug", "info", "warning", "error"]

_MOST_NAMES: Final = 20
_MOST_CHARS: Final = 300


@attrs.frozen
class Line:
    """One line of the log, not yet written."""

    level: Level
    text: str
    fields: Mapping[str, Any]
    kind: str | None = None
    """Which sort of this line, if it is told once a minute only."""


def named(field: str, names: Sequence[str]) -> dict[str, Any]:
    """Name the first twenty, and count the others."""
    fields: dict[str, Any] = {field: list(names[:_MOST_NAMES])}
    if len(names) > _MOST_NAMES:
        fields[f"{field}_more"] = len(names) - _MOST_NAMES
    return fields


def words_of(error: BaseException) -> str:
    """Name an error and say its text."""
    return brief(f"{type(error).__name__}: {error}")


def brief(text: str) -> str:
    """Cut a text from outside short."""
    return text if len(text) <= _MOST_CHARS else f"{text[:_MOST_CHARS]}..."
