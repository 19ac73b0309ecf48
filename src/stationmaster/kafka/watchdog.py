"""Which partitions have stopped without a word: assigned, asked, something is there, and nothing comes. Pure.

Rules:
1. Only silence counts in which the client was listened to: a partition is silent from its last record on, and from
   the last moment on at which the client's queue was not emptied (no room, paused, far behind, no broker).
2. After a limit of silence the broker is asked for the end of the log. Nothing there: all is well, and the silence
   begins anew.
3. More there proves nothing by itself: it may have come just now, or be transaction markers or aborted records, which
   the client fetches and keeps to itself. What the client has fetched shows in the end it knows of; a partition has
   stalled if that stays behind the broker's answer for another moment.
4. A stalled partition is read again from its position. If it stalls once more before any record of it came, it is
   stuck: somebody has to know. If reading it again does not help for long, it is hopeless: what is left is a new start.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import attrs

if TYPE_CHECKING:
    from collections.abc import Iterable

    from stationmaster.kafka.assignment import Holding

_MOMENT: Final = 1 / 6
"""Of the limit: how long the client has for fetching what the broker told of."""
_STUCK: Final = 2
HOPELESS: Final = 8
"""Stalls in a row: with the default limit nearly five minutes, since a new start costs the other partitions a pause."""


@attrs.define(eq=False)
class _Silence:
    """A partition since its last record."""

    position: int | None
    since: float
    end: int | None = None
    """The broker's answer, while the client has its moment to fetch that far."""
    fetched_by: float = 0.0
    stalls: int = 0


@attrs.define(eq=False)
class Watchdog:
    """Looks at every partition about once a second."""

    _limit_s: float
    stalls: int = attrs.field(default=0, init=False)
    """How often a partition had to be read again."""
    _silences: dict[Holding, _Silence] = attrs.field(factory=dict, init=False)

    def look(
        self, holdings: Iterable[Holding], now: float, *, heard: bool
    ) -> list[tuple[Holding, int]]:
        """Take note of how far each partition came; return those that have stalled, and their positions.

        `heard`: since the last look the client's queue was emptied at least once.
        """
        before, self._silences = self._silences, {}
        stalled = []
        for holding in holdings:
            silence, position = before.get(holding), holding.next_offset
            if silence is None or silence.position != position:
                silence = _Silence(position, now)
            elif not heard:
                silence.since, silence.end = now, None
            elif silence.end is not None and position is not None and now >= silence.fetched_by:
                if holding.fetched is None or holding.fetched < silence.end:
                    silence.stalls += 1
                    self.stalls += 1
                    stalled.append((holding, position))
                else:
                    silence.stalls = 0  # it fetches again, if only what the client keeps to itself
                silence.since, silence.end = now, None
            self._silences[holding] = silence
        return stalled

    def suspects(self, now: float) -> list[Holding]:
        """Return the partitions whose end is to be asked for, the longest silent one first."""
        due = [
            (silence.since, holding.key, holding)
            for holding, silence in self._silences.items()
            if silence.end is None and now - silence.since >= self._limit_s
        ]
        return [holding for _, _, holding in sorted(due, key=lambda each: each[:2])]

    def answered(self, suspect: Holding, end: int | None, now: float) -> None:
        """Take note of the end of its log; None: the broker did not say, and is asked again after the limit."""
        silence = self._silences[suspect]
        if end is None:
            silence.since = now
        elif silence.position is None or end <= silence.position:
            silence.since, silence.stalls = now, 0
        else:
            silence.end, silence.fetched_by = end, now + self._limit_s * _MOMENT

    @property
    def stuck(self) -> list[Holding]:
        """Those that stalled again although they were read again, as of the last look."""
        return [holding for holding, each in self._silences.items() if each.stalls >= _STUCK]

    @property
    def is_hopeless(self) -> bool:
        """Whether one of them was read again and again in vain."""
        return any(each.stalls >= HOPELESS for each in self._silences.values())
