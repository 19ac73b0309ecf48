"""The board's news, made once for all event streams.

Rules:
1. Nothing is made while nobody looks; then at most once per `interval_s`, however many look.
2. A stream keeps no queue. It remembers which edition it saw last: if that is the one before the newest, it gets what
   changed since, else the whole picture anew. So a client that takes little misses editions and costs nothing.
3. The whole is sent in pieces of bounded size: a stream holds one of them at a time.
4. Streams are woken a few at a time, with the rest of the service in between: hundreds of them must not make a batch
   late.
5. What is sent sets values and adds nothing up: news that repeat what the whole said already do no harm.

Events: `whole` (how many slots the grid has; what was told before is void), `state`, `stations` (a range of slots, or
single ones), `reports`.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

import attrs
import orjson
import trio

from stationmaster.service.station_grid import OUTCOMES
from stationmaster.service.web.page import view

if TYPE_CHECKING:
    from collections.abc import Iterator

    from stationmaster.service.status import StatusBoard

DEFAULT_INTERVAL_S: Final = 0.5
_QUIET_S: Final = 10.0
"""After so long without news there is a sign of life."""
_PIECE_SLOTS: Final = 500
_MOST_CHANGES: Final = 2_000
"""More single slots than that cost more than all of them in ranges would."""
_WOKEN_AT_ONCE: Final = 2
_SIGN_OF_LIFE: Final = b": still here\n\n"
_LOG: Final = logging.getLogger("stationmaster.web")


def event(name: str, content: object) -> bytes:
    """Return one server-sent event."""
    return b"event: %s\ndata: %s\n\n" % (name.encode(), orjson.dumps(content))


@attrs.define(eq=False)
class Broadcast:
    """Editions of what the board shows. `run` must run for new ones to appear."""

    board: StatusBoard
    interval_s: float = DEFAULT_INTERVAL_S
    edition: int = attrs.field(default=0, init=False)
    _news: tuple[bytes, ...] = attrs.field(default=(), init=False)
    _state: bytes = attrs.field(default=b"", init=False)
    _published_at: float = attrs.field(default=0.0, init=False)
    _watchers: int = attrs.field(default=0, init=False)
    _watched: trio.Event = attrs.field(factory=trio.Event, init=False)
    _waiting: trio.lowlevel.ParkingLot = attrs.field(factory=trio.lowlevel.ParkingLot, init=False)

    async def run(self) -> None:
        """Make editions until cancelled."""
        while True:
            if not self._watchers:
                self._watched = trio.Event()
                await self._watched.wait()
            try:
                is_new = self._make_edition()
            except Exception:  # noqa: BLE001
                # A fault in the picture must not end the service: the page stands still, and the log says why.
                _LOG.exception("the status picture cannot be made")
                is_new = False
            # Those that wait now: who has sent its news waits behind them, for the next edition.
            waiting = len(self._waiting) if is_new else 0
            for _ in range(0, waiting, _WOKEN_AT_ONCE):
                self._waiting.unpark(count=_WOKEN_AT_ONCE)
                await trio.lowlevel.checkpoint()
            await trio.sleep(self.interval_s)

    def _make_edition(self) -> bool:
        now = trio.current_time()
        state = event("state", view(self.board.picture()))
        changes = self.board.stations.take_changes()
        reports = self.board.take_changed_reports()
        if state != self._state or changes or reports:
            news = [state]
            if len(changes) > _MOST_CHANGES:
                news += self._all_stations()
            elif changes:
                news.append(event("stations", {"slots": changes}))
            if reports:
                news.append(event("reports", reports))
        elif now >= self._published_at + _QUIET_S:
            news = [_SIGN_OF_LIFE]
        else:
            return False
        self._news, self._state, self._published_at = tuple(news), state, now
        self.edition += 1
        return True

    # ------------------------------------------------------------------------------------------------- for a stream

    def join(self) -> None:
        """Look from now on; `leave` must follow."""
        self._watchers += 1
        self._watched.set()

    def leave(self) -> None:
        """Look no more."""
        self._watchers -= 1

    async def wait_edition(self, seen: int) -> int:
        """Wait until there is an edition other than this, and return its number."""
        await trio.lowlevel.checkpoint()
        while self.edition == seen:
            await self._waiting.park()
        return self.edition

    def pieces(self, seen: int) -> Iterator[bytes]:
        """Yield what a stream that saw this edition last must send to be up to date.

        Each piece is made when it is asked for, and is right at that time.
        """
        if seen == self.edition - 1:
            yield from self._news
        else:
            yield from self.whole()

    def whole(self) -> Iterator[bytes]:
        """Yield the picture of now in pieces."""
        shape = {"slots": len(self.board.stations), "outcomes": OUTCOMES}
        yield event("whole", shape)
        yield event("state", view(self.board.picture()))
        yield event("reports", self.board.reports()[::-1])
        yield from self._all_stations()

    def _all_stations(self) -> Iterator[bytes]:
        grid = self.board.stations
        for first in range(0, len(grid), _PIECE_SLOTS):
            ids, codes = grid.piece(first, _PIECE_SLOTS)
            yield event("stations", {"first": first, "ids": ids, "codes": codes})
