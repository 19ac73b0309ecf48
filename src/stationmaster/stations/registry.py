"""The live stations: who gets a batch's jobs, who makes room, who is given up.

Rules (each was found by breaking it):
1. Handing over never waits on a station: a full channel, an open breaker, a station that does not come back from a job
   whose time is over, and the bound on live stations are outcomes (rejected).
2. An idle station is deleted and closed with no checkpoint between the look and the close, and a job is looked up for
   and sent without one: neither can fall into the other.
3. Whatever concerns many stations is done in slices with a checkpoint between: each is a task that runs in the next
   tick, and a long tick makes other batches' deadlines late.
"""

from __future__ import annotations

import math
import statistics
from collections import OrderedDict
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import trio
from trio_util import periodic

from stationmaster.batch import Outcome, StationResult
from stationmaster.events import StationBreakerClosed
from stationmaster.outcomes import Collecting
from stationmaster.stations.station import Station, Workplace

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable

    from stationmaster.abc import Observer, StationHandler

_LOOKED_AT = 64  # stations that an estimate looks at: more do not move a median
# Units of work, about 2 us each: a job for a busy station, for an idle one, and a station made or given up.
_QUEUED, _WOKEN, _MADE = 1, 8, 32
# Units between two checkpoints: other batches' deadlines wait so long. Slices are coarser where batches come one upon
# the other: a station then has its next job before it has parked, which halves what a job costs.
_FINE, _COARSE = 64, 512
_UPON_S = 0.01  # from the end of one hand-over to the next


class Stations:
    """The live stations. Opened by `open_stations`."""

    def __init__(
        self,
        nursery: trio.Nursery,
        workplace: Workplace,
        idle: OrderedDict[str, Station],
        *,
        queue_capacity: int,
        max_live: int,
        idle_s: float,
    ) -> None:
        self._nursery = nursery
        self._workplace = workplace
        self._queue_capacity = queue_capacity
        self._max_live = max_live
        self._idle_s = idle_s
        self._live: dict[str, Station] = {}
        self._in_a_row = 0
        """Units of work since the last checkpoint of a hand-over."""
        self._handed_over_at = -math.inf
        self._idle = idle

    def __len__(self) -> int:
        """Return how many are live."""
        return len(self._live)

    async def create(self, station_ids: Iterable[str]) -> None:
        """Make stations before they have anything to do, so that none is made in the middle of work.

        They are stations like any other: given up when they were idle for long. Beyond `max_live` the others are made
        when they have data. Returns when all of them wait.
        """
        for index, station_id in enumerate(station_ids, 1):
            if len(self._live) >= self._max_live:
                break
            if station_id not in self._live:
                self._start(station_id)
            if not index % (_COARSE // _MADE):
                await trio.lowlevel.checkpoint()
        await trio.lowlevel.checkpoint()

    async def hand_over(  # noqa: ASYNC910 - small batches in a row make one slice
        self, collecting: Collecting, station_ids: Iterable[str] | None = None, /
    ) -> None:
        """Queue a job of this batch at every station that it has data of, or settle it as rejected.

        Never waits on a station. Returns early if the batch is closed meanwhile. If cancelled, the stations that have
        no job yet get none.

        Args:
            collecting: the open batch.
            station_ids: those of its stations that joined it; None: all.
        """
        began = trio.current_time()
        slice_ = _COARSE if began - self._handed_over_at < _UPON_S else _FINE
        entries = collecting.batch.entries if station_ids is None else station_ids
        for station_id in tuple(entries):  # others may join meanwhile
            self._in_a_row += self.submit(collecting, station_id)
            if self._in_a_row >= slice_:
                self._in_a_row = 0
                await trio.lowlevel.checkpoint()
                if collecting.closed:
                    break
        self._handed_over_at = trio.current_time()

    def submit(self, collecting: Collecting, station_id: str) -> int:
        """Queue this station's job of a batch, or settle it as rejected. Never waits.

        Returns:
            What that costs the loop, in the units of a slice.
        """
        cost = _QUEUED
        station = self._live.get(station_id)
        if station is None:
            if len(self._live) >= self._max_live and not self._give_up_longest_idle():
                reason = f"{self._max_live} stations are live and busy (stations.max_live)"
                collecting.settle(StationResult(station_id, Outcome.REJECTED, None, reason))
                return cost
            station = self._start(station_id)
            cost = _MADE
        elif station.is_troubled and (refusal := station.refusal(trio.current_time())):
            collecting.settle(StationResult(station_id, Outcome.REJECTED, None, refusal))
            return cost
        elif self._idle.pop(station_id, None) is not None:
            cost = _WOKEN
        try:
            station.send.send_nowait(collecting)
        except trio.WouldBlock:
            reason = f"its queue of {self._queue_capacity} jobs is full (stations.queue_capacity)"
            collecting.settle(StationResult(station_id, Outcome.REJECTED, None, reason))
        except trio.BrokenResourceError:
            # "Stop now" came between two slices of this batch: its task is gone, and the batch will be dropped.
            pass
        else:
            station.queued += 1
        return cost

    def expected_wait_s(
        self,
        station_ids: Iterable[str],
        /,
        *,
        topic: str,  # noqa: ARG002 - a station serves all topics in turn
    ) -> float:
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
            elif not station.is_troubled:
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
        station = Station(station_id, send, receive, self._workplace)
        self._live[station_id] = station
        self._nursery.start_soon(station.live, name=f"station {station_id}")
        return station

    # --------------------------------------------------------------------------------------------------- idle stations

    async def reap_idle(self) -> None:
        """Give up whoever was idle for `idle_s`, for ever."""
        async for _ in periodic(self._idle_s / 2):
            limit = trio.current_time() - self._idle_s
            given_up = 0
            while self._idle and next(iter(self._idle.values())).idle_since <= limit:
                self._give_up_longest_idle()
                given_up += 1
                if not given_up % (_FINE // _MADE):
                    await trio.lowlevel.checkpoint()

    def _give_up_longest_idle(self) -> bool:
        if not self._idle:
            return False
        station_id, station = self._idle.popitem(last=False)
        del self._live[station_id]
        station.send.close()
        breaker = station.breaker
        open_s = None if breaker is None else breaker.succeed(trio.current_time())
        if open_s is not None:
            self._workplace.observer.observe(
                StationBreakerClosed(station_id=station_id, open_s=open_s, given_up=True)
            )
        return True


@asynccontextmanager
async def open_stations(
    handler: StationHandler,
    *,
    queue_capacity: int,
    max_live: int,
    idle_s: float,
    result_bytes: int,
    job_timeout_s: float | None = None,
    breaker_failures: int = 3,
    breaker_probe_s: float = 10.0,
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
        job_timeout_s: what one job may take, if that is less than its batch's deadline leaves; None: no bound of its
            own.
        breaker_failures: jobs in a row that timed out although they had a fair chance, after which the station is
            rejected at once; 0: never.
        breaker_probe_s: seconds from one probe of such a station, or its last time-out, to the next.
        on_eased: called when an expected wait may have fallen: a station is idle, or its service time is known now.
        on_crash: called before an error that is no outcome (MemoryError, a bug) takes all stations down.
        observer: hears of helper tasks that fail, and of breakers.
    """
    # Those that wait for a job, the longest idle first. An OrderedDict, because a dict is slow at its front.
    idle: OrderedDict[str, Station] = OrderedDict()

    def rest(station: Station, now: float) -> None:
        station.idle_since = now
        idle.pop(station.station_id, None)  # it may rest anew, after a helper task failed
        idle[station.station_id] = station
        on_eased()

    workplace = Workplace(
        handler=handler,
        result_bytes=result_bytes,
        job_timeout_s=job_timeout_s,
        breaker_failures=breaker_failures,
        breaker_probe_s=breaker_probe_s,
        on_rest=rest,
        on_eased=on_eased,
        on_crash=on_crash,
        observer=observer,
    )
    async with trio.open_nursery() as nursery:
        stations = Stations(
            nursery,
            workplace,
            idle,
            queue_capacity=queue_capacity,
            max_live=max_live,
            idle_s=idle_s,
        )
        nursery.start_soon(stations.reap_idle, name="station reaper")
        yield stations
        nursery.cancel_scope.cancel()
