"""Finds what `[stations] handler` and `on_result` name."""

from __future__ import annotations

import importlib
import inspect
import re
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import TYPE_CHECKING, Any, ForwardRef, cast, get_args

import trio

from stationmaster import handlers
from stationmaster.errors import ConfigError
from stationmaster.handlers import Resources
from stationmaster.workers import check_hook, kind_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from stationmaster.abc import Handler, ResultHook

_BUILT_IN = {"embed": handlers.embed, "embed_batch": handlers.embed_batch}


@asynccontextmanager
async def open_handler(name: str, resources: Resources) -> AsyncIterator[Handler]:
    """Open the handler `name`: a built-in one, or `package.module:attribute` on the import path.

    The attribute is a handler of any kind (see `stationmaster.workers`), or a factory that, called with `Resources`,
    gives an async context manager around one.

    Raises:
        ConfigError: there is no such thing, or it is something else.
    """
    place = _Place("stations.handler", name)
    found = _BUILT_IN[name] if name in _BUILT_IN else place.find()
    async with place.open(found, resources) as handler:
        place.check(kind_of, handler)
        yield cast("Handler", handler)


@asynccontextmanager
async def open_hook(name: str, resources: Resources) -> AsyncIterator[ResultHook]:
    """Open the result hook `package.module:attribute`: `async def on_result(station, result)`, or a factory of one.

    Raises:
        ConfigError: there is no such thing, or it is something else.
    """
    place = _Place("stations.on_result", name)
    async with place.open(place.find(), resources) as hook:
        place.check(check_hook, hook)
        yield cast("ResultHook", hook)


class _Place:
    """A key of the configuration that names something on the import path."""

    def __init__(self, key: str, name: str) -> None:
        self._key = key
        self._name = name

    def find(self) -> object:
        """Import it."""
        module_name, _, attribute = self._name.partition(":")
        try:
            module = importlib.import_module(module_name)
        except ImportError as error:
            raise self._fault(f"cannot be imported ({error}); is it on PYTHONPATH?") from error
        except (Exception, SystemExit) as error:
            what = f"{type(error).__name__}: {error}"
            raise self._fault(f"cannot be imported, its module fails with {what}") from error
        try:
            return cast("object", getattr(module, attribute))
        except AttributeError:
            raise self._fault(f"module {module_name} has no {attribute!r}") from None

    @asynccontextmanager
    async def open(self, found: object, resources: Resources) -> AsyncIterator[object]:
        """Give what was found, or what it gives if it is a factory."""
        if not callable(found) or not _is_factory(found):
            await trio.lowlevel.checkpoint()
            yield found
            return
        manager = found(resources)
        if not isinstance(manager, AbstractAsyncContextManager):
            kind = type(manager).__name__
            raise self._fault(f"returned a {kind}; expected an async context manager around it")
        async with manager as given:
            yield given

    def check(self, check: Callable[[Any], object], found: object) -> None:
        """Check what was found, or given."""
        try:
            check(found)
        except TypeError as error:
            raise self._fault(f"does not fit: {error}") from None

    def _fault(self, what: str) -> ConfigError:
        return ConfigError([f"{self._key}: {self._name!r} {what}"])


def _is_factory(found: Callable[..., object]) -> bool:
    """Tell a factory from a plain function, before either is called: its first parameter is one of `Resources`."""
    if inspect.iscoroutinefunction(found):
        return False
    if inspect.isclass(found) or inspect.isasyncgenfunction(inspect.unwrap(found)):
        return True
    try:
        annotation = _first_annotation(found, evaluated=True)
    except ValueError:  # a built-in function: no factory of ours
        return False
    except Exception:  # noqa: BLE001 - an annotation is any expression, often of names that only type checkers see
        annotation = _first_annotation(found, evaluated=False)
    return any(_is_resources(each) for each in (annotation, *get_args(annotation)))


def _is_resources(annotation: object) -> bool:
    if isinstance(annotation, ForwardRef):
        annotation = annotation.__forward_arg__
    if isinstance(annotation, str):
        return re.search(r"\bResources\b", annotation) is not None
    return annotation is Resources


def _first_annotation(found: Callable[..., object], *, evaluated: bool) -> object:
    parameters = inspect.signature(found, eval_str=evaluated).parameters.values()
    return next((parameter.annotation for parameter in parameters), None)
