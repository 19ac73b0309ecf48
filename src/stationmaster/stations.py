"""The stations: one task, one nursery and one bounded channel each; a failed or stuck one never blocks another.

Rules (each was found by breaking it):
1. One cancel scope per station serves job after job and is renewed only after it was cancelled: a scope per job costs
   about three times as much CPU. Its deadline follows the job, so that `trio.current_effective_deadline()` is right
   inside a handler.
2. After every job look at `scope.cancel_called`. A cancel that came in the same tick as the result would otherwise
   fall on the next batch's job.
3. `submit` never waits: a full channel is an outcome (rejected).
4. A handler's errors end at its station's edge. An error group mixed with Cancelled is split there: the errors are
   the station's, the cancellation goes on. MemoryError, alone or in a group, and whatever is no Exception ends the
   pipeline.
5. An idle station is deleted and closed with no checkpoint between the look and the close, and `submit` looks up and
   sends without one: neither can fall into the other.
6. No job starts when its batch is closed or its deadline has come: both can happen while it waits in the channel.
"""

from __future__ import annotations

import math
import statistics
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Protocol

import attrs
import orjson
import trio
from trio_util import periodic

from stationmaster.batch import Outcome, StationInput, StationResult
from stationmaster.events import StationTrouble

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from stationmaster.abc import Observer, StationHandler
    from stationmaster.batch import Batch

_WEIGHT = 0.2  # of a new service time in the moving mean: about the last ten jobs count
_LOOKED_AT = 64  # stations that an estimate looks at: more do not move a median
_SLICE = 32  # stations given up between two checkpoints: each is a task that ends in the next tick


class Collecting(Protocol):
    """What a station needs of an open batch."""

    batch: Batch
    closed: bool
    deadline: float

    def begin(self, station_id: str, cancel: Callable[[], None]) -> None:
        """The handler runs now; `cancel` stops it."""
        ...

    def end(self, station_id: str) -> None:
        """The handler runs no more."""
        ...

    def settle(self, result: StationResult) -> None:
        """This is the station's outcome."""
        ...


@attrs.define(eq=False)
class Station:
    """One live station."""

    station_id: str
    send: trio.MemorySendChannel[Collecting]
    scope: trio.CancelScope = attrs.field(factory=trio.CancelScope)
    queued: int = 0
    idle_since: float = 0.0
    mean_s: float | None = None
    """Moving mean of its service time; None before the first answer."""
    strikes: int = 0
    """Jobs in a row that were cancelled by their batch: it is not healthy then."""


class Stations:
    """The live stations. Opened by `open_stations`."""

    def __init__(
        self,
        nursery: trio.Nursery,
        handler: StationHandler,
        *,
        queue_capacity: int,
        max_live: int,
        idle_s: float,
        result_bytes: int,
        on_eased: Callable[[], None],
        on_crash: Callable[[], None],
        observer: Observer,
    ) -> None:
        self._nursery = nursery
        self._handler = handler
        self._queue_capacity = queue_capacity
        self._max_live = max_live
        self._idle_s = idle_s
        self._result_bytes = result_bytes
        self._observer = observer
        self._on_eased = on_eased
        self._on_crash = on_crash
        self._live: dict[str, Station] = {}
        # Those that wait for a job, the longest idle first. An OrderedDict, because a dict is slow at its front.
        self._idle: OrderedDict[str, Station] = OrderedDict()

    def __len__(self) -> int:
        """Return how many are live."""
        return len(self._live)

    def submit(self, collecting: Collecting, station_id: str) -> None:
        """Queue this station's job of a batch, or settle it as rejected. Never waits."""
        station = self._live.get(station_id)
        if station is None:
            if len(self._live) >= self._max_live and not self._give_up_longest_idle():
                reason = f"{self._max_live} stations are live and busy (stations.max_live)"
                collecting.settle(StationResult(station_id, Outcome.REJECTED, None, reason))
                return
            station = self._start(station_id)
        try:
            station.send.send_nowait(collecting)
        except trio.WouldBlock:
            reason = f"its queue of {self._queue_capacity} jobs is full (stations.queue_capacity)"
            collecting.settle(StationResult(station_id, Outcome.REJECTED, None, reason))
        else:
            station.queued += 1
            self._idle.pop(station_id, None)

    def expected_wait_s(self, station_ids: Iterable[str]) -> float:
        """Estimate when a job given to these stations now would be answered.

        Returns:
            The median over the healthy ones of (queued jobs + 1) x mean service time; 0 for an idle or unknown
            station, infinity for one that works on its first job, 0 if none is healthy.
        """
        waits: list[float] = []
        for station_id in station_ids:
            station = self._live.get(station_id)
            if station is None:
                waits.append(0.0)
            elif not station.strikes:
                if station_id in self._idle:
                    waits.append(0.0)
                elif station.mean_s is None:
                    waits.append(math.inf)
                else:
                    waits.append((station.queued + 1) * station.mean_s)
            if len(waits) >= _LOOKED_AT:
                break
        return statistics.median_high(waits) if waits else 0.0

    def _start(self, station_id: str) -> Station:
        send, receive = trio.open_memory_channel[Collecting](self._queue_capacity)
        station = Station(station_id, send)
        self._live[station_id] = station
        self._nursery.start_soon(self._run, station, receive, name=f"station {station_id}")
        return station

    async def _run(self, station: Station, receive: trio.MemoryReceiveChannel[Collecting]) -> None:
        try:
            await self._live_on(station, receive)
        except BaseException as error:
            if not _is_cancellation(error):
                self._on_crash()  # before the others are cancelled: their errors then are no answers
            raise

    async def _live_on(  # noqa: ASYNC910 - `_serve` waits for a job first
        self, station: Station, receive: trio.MemoryReceiveChannel[Collecting]
    ) -> None:
        """Serve a station to the end of its channel, anew whenever a helper task of its handler fails."""
        with receive:
            ended = False
            while not ended:
                own: Exception | None = None
                try:
                    async with trio.open_nursery() as helpers:
                        try:
                            ended = await self._serve(station, receive, helpers)
                        except Exception as error:  # noqa: BLE001 - raised again below: it is no helper's
                            own = error
                        helpers.cancel_scope.cancel()
                except* MemoryError:
                    raise
                except* Exception as group:  # noqa: BLE001 - whatever a helper task raises
                    self._observer.observe(
                        StationTrouble(station_id=station.station_id, error=group)
                    )
                if own is not None:
                    raise own

    async def _serve(
        self,
        station: Station,
        receive: trio.MemoryReceiveChannel[Collecting],
        helpers: trio.Nursery,
    ) -> bool:
        """Work on job after job; return whether the channel is at its end (else a helper task failed)."""
        clock = trio.current_time
        while True:
            with trio.CancelScope() as scope:
                station.scope = scope
                while True:
                    try:
                        collecting = receive.receive_nowait()
                    except trio.WouldBlock:
                        scope.deadline = math.inf
                        self._rest(station)
                        try:
                            collecting = await receive.receive()
                        except trio.EndOfChannel:
                            return True
                    except trio.EndOfChannel:
                        return True
                    station.queued -= 1
                    started = clock()
                    if collecting.closed or started >= collecting.deadline:
                        continue
                    scope.deadline = collecting.deadline
                    await self._work(station, collecting, helpers)
                    if helpers.cancel_scope.cancel_called:
                        return False  # the next job is none of this failure's business
                    if scope.cancel_called:
                        break
                    self._measure(station, clock() - started)
            station.strikes += 1

    async def _work(  # noqa: ASYNC910 - a handler that never waits is served up to one queue in a row
        self, station: Station, collecting: Collecting, helpers: trio.Nursery
    ) -> None:
        """Run one job; its errors are its outcome."""
        station_id, batch = station.station_id, collecting.batch
        job = StationInput(
            station_id, batch.entries[station_id], batch, batch.last_message[station_id], helpers
        )
        collecting.begin(station_id, station.scope.cancel)
        try:
            result = self._result(station_id, await self._handler(job))
        except Exception as error:
            if _is_fatal(error):
                raise
            collecting.settle(_failure(station_id, error))
        except BaseExceptionGroup as group:
            errors, rest = group.split(Exception)
            if errors is not None and _is_fatal(errors):
                raise
            if errors is not None:
                collecting.settle(_failure(station_id, errors))
            if rest is not None:
                raise rest from None
        else:
            collecting.settle(result)
        finally:
            collecting.end(station_id)
            if helpers.cancel_scope.cancel_called and not collecting.closed:
                # A helper task failed and took the job with it; an outcome that was settled before counts.
                collecting.settle(
                    StationResult(station_id, Outcome.FAILED, None, "a helper task failed")
                )

    def _measure(self, station: Station, seconds: float) -> None:
        station.strikes = 0
        if station.mean_s is None:
            station.mean_s = seconds
            self._on_eased()
        else:
            station.mean_s += _WEIGHT * (seconds - station.mean_s)

    def _result(self, station_id: str, value: object) -> StationResult:
        if value is None:
            return StationResult(station_id, Outcome.NO_OUTPUT, None, "the handler returned None")
        if not isinstance(value, Mapping):
            reason = f"the handler returned {type(value).__name__}, expected a mapping or None"
            return StationResult(station_id, Outcome.FAILED, None, reason)
        # Encoded here and not with the report: a value that is no JSON fails its own station only.
        row: dict[str, Any] = {"stationId": station_id}
        row.update(value)
        row["stationId"] = station_id
        encoded = orjson.dumps(row)
        if len(encoded) > self._result_bytes:
            reason = f"the result has {len(encoded)} bytes, limit {self._result_bytes} (limits.result_bytes)"
            return StationResult(station_id, Outcome.FAILED, None, reason)
        return StationResult(station_id, Outcome.SUCCEEDED, value, "", encoded)

    # --------------------------------------------------------------------------------------------------- idle stations

    def _rest(self, station: Station) -> None:
        station.idle_since = trio.current_time()
        self._idle[station.station_id] = station
        self._idle.move_to_end(station.station_id)  # it may rest anew, after a helper task failed
        self._on_eased()

    async def _reap_idle(self) -> None:
        async for _ in periodic(self._idle_s / 2):
            limit = trio.current_time() - self._idle_s
            given_up = 0
            while self._idle and next(iter(self._idle.values())).idle_since <= limit:
                self._give_up_longest_idle()
                given_up += 1
                if not given_up % _SLICE:
                    await trio.lowlevel.checkpoint()

    def _give_up_longest_idle(self) -> bool:
        if not self._idle:
            return False
        station_id, station = self._idle.popitem(last=False)
        del self._live[station_id]
        station.send.close()
        return True


def _is_cancellation(error: BaseException) -> bool:
    if isinstance(error, BaseExceptionGroup):
        return error.split(trio.Cancelled)[1] is None
    return isinstance(error, trio.Cancelled)


def _is_fatal(error: Exception) -> bool:
    if isinstance(error, ExceptionGroup):
        return error.subgroup(MemoryError) is not None
    return isinstance(error, MemoryError)


def _failure(station_id: str, error: Exception) -> StationResult:
    while isinstance(error, ExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    try:
        # Half a character would fail the whole report.
        text = str(error)[:500].encode(errors="replace").decode()
    except Exception as unreadable:  # noqa: BLE001 - `__str__` belongs to the handler's side too
        text = f"its text cannot be read ({type(unreadable).__name__})"
    name = type(error).__name__
    return StationResult(station_id, Outcome.FAILED, None, f"{name}: {text}" if text else name)


@asynccontextmanager
async def open_stations(
    handler: StationHandler,
    *,
    queue_capacity: int,
    max_live: int,
    idle_s: float,
    result_bytes: int,
    on_eased: Callable[[], None],
    on_crash: Callable[[], None],
    observer: Observer,
) -> AsyncIterator[Stations]:
    """Own the station tasks; leaving the block cancels them.

    Args:
        handler: called once per station and batch.
        queue_capacity: jobs that may wait at one station.
        max_live: stations with a task of their own; beyond it the longest idle one goes, else the new one is rejected.
        idle_s: an idle station is given up after this many seconds (at latest after one and a half times that).
        result_bytes: bound of one encoded result.
        on_eased: called when an expected wait may have fallen: a station is idle, or its service time is known now.
        on_crash: called before an error that is no outcome (MemoryError, a bug) takes all stations down.
        observer: hears of helper tasks that fail.
    """
    async with trio.open_nursery() as nursery:
        stations = Stations(
            nursery,
            handler,
            queue_capacity=queue_capacity,
            max_live=max_live,
            idle_s=idle_s,
            result_bytes=result_bytes,
            on_eased=on_eased,
            on_crash=on_crash,
            observer=observer,
        )
        nursery.start_soon(stations._reap_idle, name="station reaper")  # noqa: SLF001 - its own module
        yield stations
        nursery.cancel_scope.cancel()
