"""How long the oldest offset waits for its commit, made out of events: when it came, and when its commit was taken."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Final

import attrs

if TYPE_CHECKING:
    from collections.abc import Iterable

    from stationmaster.batch import OffsetRange

_STEP_S: Final = 0.25
_MOST: Final = 1024


@attrs.define(eq=False)
class Uncommitted:
    """What came per held partition: ((generation, last offset), when), oldest first.

    A log that was cut or made anew begins a new generation, and offsets of the one before are committed no more: a
    commit of the new one counts for them too, one of the old one never for what is new.

    Bounded: what comes within a quarter of a second of the newest is counted to it, and so is all beyond 1,024 of
    them. So the age may be told a little too high, never too low. Partitions that were never assigned (of a file)
    have no commits and are not counted.
    """

    _held: dict[tuple[str, int], deque[tuple[tuple[int, int], float]]] = attrs.field(
        factory=dict, init=False
    )

    def assign(self, partitions: Iterable[tuple[str, int]]) -> None:
        """These came: nothing of them is open."""
        for key in partitions:
            self._held[key] = deque()

    def leave(self, partitions: Iterable[tuple[str, int]]) -> None:
        """These left: what is open of them is not ours to commit."""
        for key in partitions:
            self._held.pop(key, None)

    def came(
        self, topic: str, partition: int, last: int, *, now: float, generation: int = 0
    ) -> None:
        """Take note of offsets up to `last`."""
        mark = generation, last
        waiting = self._held.get((topic, partition))
        if waiting is None:
            return
        if waiting:
            newest, since = waiting[-1]
            if now - since < _STEP_S or len(waiting) >= _MOST:
                waiting[-1] = max(newest, mark), since
                return
        waiting.append((mark, now))

    def committed(self, offsets: Iterable[OffsetRange]) -> None:
        """Take note that the broker has these, and all before."""
        for one in offsets:
            waiting = self._held.get((one.topic, one.partition))
            while waiting and waiting[0][0] <= (one.generation, one.last):
                waiting.popleft()

    def oldest_age_s(self, now: float) -> float:
        """Return for how long the oldest waits; 0 if none does."""
        came = [waiting[0][1] for waiting in self._held.values() if waiting]
        return now - min(came) if came else 0.0
