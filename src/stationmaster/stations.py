"""The stations: one task, one nursery and one bounded channel each; a failed or stuck one never blocks another.

Rules (each was found by breaking it):
1. One cancel scope per station serves job after job and is renewed only after it was cancelled: a scope per job costs
   about three times as much CPU. Its deadline follows the job, so that `trio.current_effective_deadline()` is right
   inside a handler.
2. After every job look at `scope.cancel_called`. A cancel that came in the same tick as the result would otherwise
   fall on the next batch's job.
3. `submit` never waits: a full channel is an outcome (rejected).
4. A handler's errors end at its station's edge. An error group mixed with Cancelled is split there: the errors are
   the station's, the cancellation goes on. MemoryError and whatever is no Exception ends the pipeline.
5. An idle station is deleted and closed with no checkpoint between the look and the close, and `submit` looks up and
   sends without one: neither can fall into the other.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import attrs
import orjson
import trio
from trio_util import periodic

from stationmaster.batch import Outcome, StationInput, StationResult
from stationmaster.events import StationTrouble

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from stationmaster.abc import Observer, StationHandler

_WEIGHT = 0.2  # of a new service time in the moving mean: about the last ten jobs count
_LOOKED_AT = 64  # stations that an estimate looks at: more do not move a median


class Collecting(Protocol):
    """What a station needs of an open batch."""

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


Job: TypeAlias = tuple[Collecting, StationInput]


@attrs.define(eq=False)
class Station:
    """One live station."""

    station_id: str
    send: trio.MemorySendChannel[Job]
    scope: trio.CancelScope = attrs.field(factory=trio.CancelScope)
    busy: bool = False
    queued: int = 0
    last_active: float = 0.0
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
        on_measured: Callable[[], None],
        observer: Observer,
    ) -> None:
        self._nursery = nursery
        self._handler = handler
        self._queue_capacity = queue_capacity
        self._max_live = max_live
        self._idle_s = idle_s
        self._result_bytes = result_bytes
        self._observer = observer
        self._live: dict[str, Station] = {}
        self._on_measured = on_measured

    def __len__(self) -> int:
        """Return how many are live."""
        return len(self._live)

    def submit(self, collecting: Collecting, job: StationInput) -> None:
        """Queue a job at its station, or settle it as rejected. Never waits."""
        station_id = job.station_id
        station = self._live.get(station_id)
        if station is None:
            if len(self._live) >= self._max_live and not self._reap_longest_idle():
                reason = f"{self._max_live} stations are live and busy (stations.max_live)"
                collecting.settle(StationResult(station_id, Outcome.REJECTED, None, reason))
                return
            station = self._start(station_id)
        try:
            station.send.send_nowait((collecting, job))
        except trio.WouldBlock:
            reason = f"its queue of {self._queue_capacity} jobs is full (stations.queue_capacity)"
            collecting.settle(StationResult(station_id, Outcome.REJECTED, None, reason))
        else:
            station.queued += 1

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
                if not station.busy and not station.queued:
                    waits.append(0.0)
                elif station.mean_s is None:
                    waits.append(math.inf)
                else:
                    waits.append((station.queued + 1) * station.mean_s)
            if len(waits) >= _LOOKED_AT:
                break
        return statistics.median_high(waits) if waits else 0.0

    def _start(self, station_id: str) -> Station:
        send, receive = trio.open_memory_channel[Job](self._queue_capacity)
        station = Station(station_id, send, last_active=trio.current_time())
        self._live[station_id] = station
        self._nursery.start_soon(self._run, station, receive, name=f"station {station_id}")
        return station

    async def _run(  # noqa: ASYNC910 - `_serve` waits for a job first
        self, station: Station, receive: trio.MemoryReceiveChannel[Job]
    ) -> None:
        """Serve a station to the end of its channel, anew whenever a helper task of its handler fails."""
        with receive:
            ended = False
            while not ended:
                own: Exception | None = None
                try:
                    async with trio.open_nursery() as helpers:
                        try:
                            await self._serve(station, receive, helpers)
                            ended = True
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
        receive: trio.MemoryReceiveChannel[Job],
        helpers: trio.Nursery,
    ) -> None:
        clock = trio.current_time
        while True:
            with trio.CancelScope() as scope:
                station.scope = scope
                while True:
                    station.busy = False
                    try:
                        collecting, job = receive.receive_nowait()
                    except trio.WouldBlock:
                        scope.deadline = math.inf
                        try:
                            collecting, job = await receive.receive()
                        except trio.EndOfChannel:
                            return
                    except trio.EndOfChannel:
                        return
                    station.queued -= 1
                    if collecting.closed:
                        continue
                    station.busy = True
                    started = clock()
                    scope.deadline = collecting.deadline
                    await self._work(station, collecting, job, helpers)
                    station.last_active = now = clock()
                    if scope.cancel_called:
                        break
                    self._measure(station, now - started)
            station.strikes += 1
            station.last_active = clock()

    async def _work(  # noqa: ASYNC910 - a handler that never waits is served up to one queue in a row
        self, station: Station, collecting: Collecting, job: StationInput, helpers: trio.Nursery
    ) -> None:
        """Run one job; its errors are its outcome."""
        station_id = station.station_id
        collecting.begin(station_id, station.scope.cancel)
        try:
            result = self._result(station_id, await self._handler(job))
        except MemoryError:
            raise
        except Exception as error:  # noqa: BLE001 - a handler's error is its station's outcome, whatever it is
            result = _failure(station_id, error)
        except BaseExceptionGroup as group:
            errors, rest = group.split(Exception)
            if rest is None or (errors is not None and errors.subgroup(MemoryError) is not None):
                raise
            if errors is not None:
                collecting.settle(_failure(station_id, errors))
            raise rest from None
        finally:
            collecting.end(station_id)
            if helpers.cancel_scope.cancel_called:
                # A helper task of this station failed (or everything ends, and the batch is closed already).
                collecting.settle(
                    StationResult(station_id, Outcome.FAILED, None, "a helper task failed")
                )
        collecting.settle(result)

    def _measure(self, station: Station, seconds: float) -> None:
        station.strikes = 0
        if station.mean_s is None:
            station.mean_s = seconds
            self._on_measured()
        else:
            station.mean_s += _WEIGHT * (seconds - station.mean_s)

    def _result(self, station_id: str, value: Mapping[str, Any] | None) -> StationResult:
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

    # ------------------------------------------------------------------------------------------------------ reaping

    async def _reap_idle(self) -> None:
        async for _ in periodic(self._idle_s / 2):
            limit = trio.current_time() - self._idle_s
            for station in [*self._live.values()]:
                if _is_idle(station) and station.last_active <= limit:
                    self._close(station)

    def _reap_longest_idle(self) -> bool:
        idle = [station for station in self._live.values() if _is_idle(station)]
        if not idle:
            return False
        self._close(min(idle, key=lambda station: station.last_active))
        return True

    def _close(self, station: Station) -> None:
        del self._live[station.station_id]
        station.send.close()


def _is_idle(station: Station) -> bool:
    return not station.busy and not station.queued


def _failure(station_id: str, error: Exception) -> StationResult:
    while isinstance(error, ExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    text = str(error)[:500]
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
    on_measured: Callable[[], None],
    observer: Observer,
) -> AsyncIterator[Stations]:
    """Own the station tasks; leaving the block cancels them.

    Args:
        handler: called once per station and batch.
        queue_capacity: jobs that may wait at one station.
        max_live: stations with a task of their own; beyond it the longest idle one goes, else the new one is rejected.
        idle_s: an idle station is given up after this many seconds (at latest after one and a half times that).
        result_bytes: bound of one encoded result.
        on_measured: called when a station's service time becomes known: an estimate may have changed a lot.
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
            on_measured=on_measured,
            observer=observer,
        )
        nursery.start_soon(stations._reap_idle, name="station reaper")  # noqa: SLF001 - its own module
        yield stations
        nursery.cancel_scope.cancel()
