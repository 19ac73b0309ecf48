"""Gatherings: which open batch a message of a topic and time joins (`by="timestamp"`).

1. It joins the oldest open batch of its topic and time that can take all of it: nothing is decided there, and none of
   its stations has begun its job. Readings of a station whose job still waits reach the handler together with those.
2. Else it opens a follow-up batch, which says so. A follow-up expects whom its messages name: the roster was waited for
   by the batch before.
3. Which times had a batch is remembered for `_REMEMBERED` of them and this life of the process. After that a batch does
   not know that it follows another.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Final, Generic, Protocol, TypeAlias, TypeVar

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable
    from datetime import datetime

Key: TypeAlias = "tuple[str, datetime]"
"""Topic and time."""

_REMEMBERED: Final = 10_000


class Gathering(Protocol):
    """An open batch that others may join."""

    def takes(self, station_ids: Iterable[str], /) -> bool:
        """Tell whether data of these stations may join."""
        ...


G = TypeVar("G", bound=Gathering)


class Gatherings(Generic[G]):
    """Open batches by topic and time, oldest first; and the times of those that were delivered."""

    def __init__(self) -> None:
        self._open: dict[Key, list[G]] = {}
        self._delivered: OrderedDict[Key, None] = OrderedDict()

    def place_for(self, key: Key, station_ids: Collection[str]) -> G | None:
        """Return the batch that messages of this time and these stations join, or None."""
        return next((open_ for open_ in self._open.get(key, ()) if open_.takes(station_ids)), None)

    def follows(self, key: Key) -> bool:
        """Tell whether a batch that is opened now is a follow-up."""
        return key in self._open or key in self._delivered

    def enter(self, key: Key, gathering: G) -> None:
        """Take note of an open batch."""
        self._open.setdefault(key, []).append(gathering)

    def leave(self, key: Key, gathering: G, *, delivered: bool) -> None:
        """Take note that it is open no more. Given up, it comes again, and that is no follow-up."""
        self._open[key].remove(gathering)
        if not self._open[key]:
            del self._open[key]
        if delivered:
            self._delivered[key] = None
            self._delivered.move_to_end(key)
            if len(self._delivered) > _REMEMBERED:
                self._delivered.popitem(last=False)
