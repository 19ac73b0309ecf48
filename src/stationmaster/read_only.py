"""JSON that many hands share: dicts and lists that look like any other and cannot be changed.

A copy for each of a thousand stations would cost the event loop seconds where the JSON is large; this costs one walk.
They are real dicts and lists, so whoever writes JSON takes them. Copies are plain and may be changed: `copy.deepcopy()`
and pickle copy all of it, `dict()`, `{**...}`, `copy.copy()` and `.copy()` the outermost level.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

_KindT = TypeVar("_KindT", bound=type)


def read_only(value: Any) -> Any:  # noqa: ANN401 - whatever JSON holds
    """Return the same JSON, read-only all the way down."""
    if isinstance(value, dict):
        return ReadOnlyDict({name: read_only(one) for name, one in value.items()})
    if isinstance(value, list):
        return ReadOnlyList([read_only(one) for one in value])
    return value


def _plain(value: Any) -> Any:  # noqa: ANN401
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_plain(one) for one in value]
    return value


def _refuse(self: object, /, *_: object, **__: object) -> NoReturn:
    kind = "dict" if isinstance(self, dict) else "list"
    raise TypeError(
        f"this {kind} is shared by all stations of its message, and read-only: change a copy.deepcopy() of it"
    )


def _refusing(*methods: str) -> Callable[[_KindT], _KindT]:
    def decorate(kind: _KindT) -> _KindT:
        for method in methods:
            setattr(kind, method, _refuse)
        return kind

    return decorate


@_refusing("__setitem__", "__delitem__", "__ior__")
@_refusing("clear", "pop", "popitem", "setdefault", "update")
class ReadOnlyDict(dict[str, Any]):
    """A dict that refuses to be changed."""

    __slots__ = ()

    def __reduce__(self) -> tuple[Any, ...]:  # type: ignore[explicit-override]  # typing.override came with Python 3.12
        return dict, (dict(self),)

    def __deepcopy__(self, memo: object, /) -> Any:  # noqa: ANN401
        return _plain(self)


@_refusing("__setitem__", "__delitem__", "__iadd__", "__imul__")
@_refusing("append", "clear", "extend", "insert", "pop", "remove", "reverse", "sort")
class ReadOnlyList(list[Any]):
    """A list that refuses to be changed."""

    __slots__ = ()

    def __reduce__(self) -> tuple[Any, ...]:  # type: ignore[explicit-override]  # typing.override came with Python 3.12
        return list, (list(self),)

    def __deepcopy__(self, memo: object, /) -> Any:  # noqa: ANN401
        return _plain(self)
