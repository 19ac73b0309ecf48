"""Plain functions as handlers: each call in a thread, and what becomes of threads that do not come back.

A thread cannot be stopped. When a job is given up (its batch closed), its thread is abandoned:
1. Nothing waits for it: not the batch, not the end of the pipeline, not the end of the program (trio's threads are
   daemons).
2. It keeps its place among `threads` until it really ends, so there are never more than that.
3. Its station stays busy: the next job waits for its end, or is given up at its own batch's deadline. Two calls for
   one station never overlap, and order holds.
4. What it returns is late: counted and dropped.

Who settles a call is decided under the call's lock: a thread that starts after its job was given up does not call the
handler at all, and an end is either the job's answer or late, never both.
"""

from __future__ import annotations

import enum
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import trio

from stationmaster.events import LateResult, ThreadAbandoned, ThreadReturned

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from stationmaster.abc import BlockingHandler, Observer
    from stationmaster.batch import StationInput


class ThreadedHandler:
    """A plain function as a station handler."""

    def __init__(self, handle: BlockingHandler, *, threads: int, observer: Observer) -> None:
        """Wrap `handle`; at most `threads` calls run at once, abandoned ones included."""
        self._handle = handle
        self._limiter = trio.CapacityLimiter(threads)
        self._observer = observer
        self._abandoned: dict[str, _Call] = {}

    @property
    def abandoned(self) -> int:
        """Threads that go on although their job was given up."""
        return len(self._abandoned)

    async def __call__(self, station: StationInput) -> Mapping[str, Any] | None:
        """Call the function in a thread; if cancelled, leave that behind."""
        station_id = station.station_id
        while (earlier := self._abandoned.get(station_id)) is not None:
            await earlier.gone.wait()
        call = _Call(self._handle, station, self._returned)
        try:
            return await trio.to_thread.run_sync(
                call.run,
                thread_name=f"station {station_id}",
                abandon_on_cancel=True,
                limiter=self._limiter,
            )
        except trio.Cancelled:
            match call.give_up():
                case _State.ABANDONED:
                    self._abandoned[station_id] = call
                    self._observer.observe(
                        ThreadAbandoned(
                            batch_id=station.batch_id,
                            station_id=station_id,
                            abandoned=len(self._abandoned),
                            threads=int(self._limiter.total_tokens),
                        )
                    )
                case _State.ENDED:
                    self._count_late(station)
            raise

    def _returned(self, call: _Call) -> None:
        """Take note, in trio's thread, that an abandoned thread has ended."""
        station, error = call.station, call.error
        call.error = None  # its traceback leads back to the call
        del self._abandoned[station.station_id]
        call.gone.set()
        self._observer.observe(
            ThreadReturned(
                batch_id=station.batch_id,
                station_id=station.station_id,
                abandoned=len(self._abandoned),
                seconds=trio.current_time() - call.given_up_at,
                error=error,
            )
        )
        if not isinstance(error, trio.Cancelled):  # else it asked, and left as it was told to
            self._count_late(station)

    def _count_late(self, station: StationInput) -> None:
        self._observer.observe(LateResult(batch_id=station.batch_id, station_id=station.station_id))


class _State(enum.Enum):
    WAITING = enum.auto()  # for a place, or for its thread to begin
    RUNNING = enum.auto()
    ENDED = enum.auto()
    GIVEN_UP = enum.auto()  # before it began: the handler is not called
    ABANDONED = enum.auto()


class _Call:
    """One call of the function."""

    __slots__ = (
        "_handle",
        "_lock",
        "_on_returned",
        "_state",
        "_token",
        "error",
        "given_up_at",
        "gone",
        "station",
    )

    def __init__(
        self,
        handle: BlockingHandler,
        station: StationInput,
        on_returned: Callable[[_Call], None],
    ) -> None:
        self.station = station
        self.gone = trio.Event()
        """Set when an abandoned thread has ended."""
        self.given_up_at = 0.0
        self.error: BaseException | None = None
        """What an abandoned thread raised at last."""
        self._handle = handle
        self._on_returned = on_returned
        self._token = trio.lowlevel.current_trio_token()
        # Guards `_state`: the thread and trio's thread both change it.
        self._lock = threading.Lock()
        self._state = _State.WAITING

    def run(self) -> Mapping[str, Any] | None:
        """Call the function, in the thread."""
        with self._lock:
            if self._state is _State.GIVEN_UP:
                return None  # nobody listens
            self._state = _State.RUNNING
        try:
            value = self._handle(self.station)
        except BaseException as error:
            self._end(error)
            raise
        self._end(None)
        return value

    def _end(self, error: BaseException | None) -> None:
        with self._lock:
            was_abandoned = self._state is _State.ABANDONED
            self._state = _State.ENDED
        if was_abandoned:
            self.error = error
            with suppress(trio.RunFinishedError):  # then nobody waits for it any more
                self._token.run_sync_soon(self._on_returned, self)

    def give_up(self) -> _State:
        """Leave it, in trio's thread; return what that means."""
        self.given_up_at = trio.current_time()
        with self._lock:
            if self._state is _State.WAITING:
                self._state = _State.GIVEN_UP
            elif self._state is _State.RUNNING:
                self._state = _State.ABANDONED
            return self._state
