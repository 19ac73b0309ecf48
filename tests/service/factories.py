"""Functions whose annotations can be evaluated, unlike those of `handlers`: which of them are factories."""

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, Optional

import stationmaster
from stationmaster import StationInput


class WaterResources:
    """A class of a handler's own, whose name holds that of ours."""


class Shelf:
    """Where another class has the very name of ours."""

    class Resources:
        """Not ours."""


_POOL = WaterResources()


@asynccontextmanager
async def _plain() -> AsyncIterator[Callable[[StationInput], dict[str, Any]]]:
    yield handle


def handle(station: StationInput, pool: WaterResources = _POOL) -> dict[str, Any]:
    """Be a plain handler with a pool."""
    return {}


def handle_of_shelf(station: Shelf.Resources) -> dict[str, Any]:
    """Be a plain handler, and say something odd of its station."""
    return {}


def handle_of_unknown_shelf(
    station: Shelf.Resources,
    pool: "Unknown" = None,  # type: ignore[name-defined]  # noqa: F821
) -> dict[str, Any]:
    """Be the same, with an annotation beside it that nobody can evaluate."""
    return {}


def handle_unknown(
    station: "StationInput",
    pool: "WaterResources | Unknown" = _POOL,  # type: ignore[name-defined]  # noqa: F821
) -> dict[str, Any]:
    """Be a plain handler with an annotation that nobody can evaluate."""
    return {}


def handle_with_ours(
    station: StationInput, resources: stationmaster.Resources | None = None
) -> dict[str, Any]:
    """Be a plain handler that a test may give resources."""
    return {}


def open_plain(
    resources: stationmaster.Resources,
) -> AbstractAsyncContextManager[Callable[[StationInput], dict[str, Any]]]:
    """Be a factory, but no generator."""
    return _plain()


def open_optional(
    resources: "stationmaster.Resources | None" = None,
) -> AbstractAsyncContextManager[Callable[[StationInput], dict[str, Any]]]:
    """Be a factory that can be called without anything."""
    return _plain()


def open_quoted(
    resources: Optional["stationmaster.Resources"] = None,
) -> AbstractAsyncContextManager[Callable[[StationInput], dict[str, Any]]]:
    """Be a factory with a reference inside of its annotation."""
    return _plain()


def open_quoted_twice(
    resources: "'stationmaster.Resources'",  # type: ignore[valid-type]
) -> AbstractAsyncContextManager[Callable[[StationInput], dict[str, Any]]]:
    """Be a factory with quotes where all annotations are texts already."""
    return _plain()


def open_unknown(
    resources: "stationmaster.Resources | Unknown",  # type: ignore[name-defined]  # noqa: F821
) -> AbstractAsyncContextManager[Callable[[StationInput], dict[str, Any]]]:
    """Be a factory with an annotation that nobody can evaluate."""
    return _plain()
