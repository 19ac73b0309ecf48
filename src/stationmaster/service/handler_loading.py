"""Finds the handler that `[stations] handler` names."""

from __future__ import annotations

import importlib
import inspect
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import TYPE_CHECKING, Any

import trio

from stationmaster import handlers
from stationmaster.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from stationmaster.abc import StationHandler
    from stationmaster.handlers import Resources

_BUILT_IN = {"embed": handlers.embed}


@asynccontextmanager
async def open_handler(name: str, resources: Resources) -> AsyncIterator[StationHandler]:
    """Open the handler `name`: a built-in one, or `package.module:attribute` on the import path.

    The attribute is `async def handle(station)`, or a factory that, called with `Resources`, gives an async context
    manager around such a function.

    Raises:
        ConfigError: there is no such thing, or it is something else.
    """
    found = _find(name)
    if inspect.iscoroutinefunction(found):
        await trio.lowlevel.checkpoint()
        yield found
        return
    if not callable(found) or not _may_be_a_factory(found):
        raise _fault(
            name,
            f"is a plain {type(found).__name__}; expected an async function, or a function of `Resources` that "
            "returns an async context manager",
        )
    manager = found(resources)
    if not isinstance(manager, AbstractAsyncContextManager):
        raise _fault(
            name,
            f"returned a {type(manager).__name__}; expected an async context manager around a handler",
        )
    async with manager as handler:
        if not inspect.iscoroutinefunction(handler) and not inspect.iscoroutinefunction(
            getattr(handler, "__call__", None)  # noqa: B004 - an object whose call is a coroutine
        ):
            raise _fault(name, f"gave a {type(handler).__name__}; expected an async function")
        yield handler


def _may_be_a_factory(found: Callable[..., object]) -> bool:
    """Tell a factory from the natural mistake, a handler that is not async, before it is called."""
    return (
        inspect.isclass(found)
        or inspect.isasyncgenfunction(inspect.unwrap(found))
        or "Resources" in str(inspect.signature(found))
    )


def _find(name: str) -> Any:  # noqa: ANN401 - whatever the module holds; the caller looks at it
    if name in _BUILT_IN:
        return _BUILT_IN[name]
    module_name, _, attribute = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise _fault(name, f"cannot be imported ({error}); is it on PYTHONPATH?") from error
    except (Exception, SystemExit) as error:
        what = f"{type(error).__name__}: {error}"
        raise _fault(name, f"cannot be imported, its module fails with {what}") from error
    try:
        return getattr(module, attribute)
    except AttributeError:
        raise _fault(name, f"module {module_name} has no {attribute!r}") from None


def _fault(name: str, what: str) -> ConfigError:
    return ConfigError([f"stations.handler: {name!r} {what}"])
