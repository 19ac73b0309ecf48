"""Batch handlers: one call for all stations of a batch, which reports them as they come.

Rules:
1. Ordered (the default): a lane per topic, one call at a time, in the order of opening. What waits in the lane is
   settled at its own deadline. Not ordered: every batch is called at once.
2. A call runs under its batch's deadline and is cancelled when the batch closes, however it closes. A scope serves one
   call only: at one per batch its cost does not count.
3. The handler gets a copy of the batch's tables: what it does to them is its own affair. Stations that join an open
   batch (`by = "timestamp"`) get a call of their own, with these alone; in a lane one call for all that join while it
   waits: a batch takes one place there, however many messages it comes in.
4. What it never reported when the call ends is failed, by its error if there is one. What was reported stands.
5. A report of an unknown station, or a second one, raises at the place that reports. A report after the batch was
   closed, or after the call ended, is late: counted and dropped.
6. MemoryError, and whatever is no Exception, ends the pipeline, as with stations.
7. Lanes are bounded, and so are calls that do not end although they were cancelled: beyond `queue_capacity` a batch's
   stations are rejected.
"""

from __future__ import annotations

import math
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import attrs
import trio

from stationmaster.batch import Outcome, StationResult
from stationmaster.events import BatchHandlerTrouble, LateResult
from stationmaster.outcomes import answer_of, failure_of, is_cancellation, is_fatal

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping

    from stationmaster.abc import BatchHandler, Observer, Report
    from stationmaster.batch import Batch
    from stationmaster.outcomes import Collecting

_SLICE = 64  # stations settled between two checkpoints
_WEIGHT = 0.2  # of a new call's seconds in the moving mean


@attrs.frozen(eq=False)
class Job:
    """One call to be made."""

    collecting: Collecting
    station_ids: list[str]
    """Grows while it waits in a lane."""


@attrs.define(eq=False)
class Lane:
    """The batches of one topic, one call at a time."""

    send: trio.MemorySendChannel[Job]
    waiting: dict[Collecting, Job] = attrs.field(factory=dict)
    """The one call of each batch that has not begun."""
    calls: int = 0
    """Waiting, and the one that runs."""
    mean_s: float | None = None
    """Moving mean of a call's seconds; None before the first whole one."""
    strikes: int = 0
    """Calls in a row that were cut before everybody was reported: the lane is not healthy then."""


class BatchLanes:
    """Runs a batch handler. Opened by `open_batch_lanes`."""

    def __init__(
        self,
        nursery: trio.Nursery,
        handler: BatchHandler,
        *,
        ordered: bool,
        queue_capacity: int,
        result_bytes: int,
        on_eased: Callable[[], None],
        on_crash: Callable[[], None],
        observer: Observer,
    ) -> None:
        self._nursery = nursery
        # What it returns is looked at, although it should be nothing.
        self._handler: Callable[[Batch, Report], Awaitable[object]] = handler
        self._ordered = ordered
        self._queue_capacity = queue_capacity
        self._result_bytes = result_bytes
        self._on_eased = on_eased
        self._on_crash = on_crash
        self._observer = observer
        self._lanes: dict[str, Lane] = {}
        self._calls = 0

    def __len__(self) -> int:
        """Return how many calls run or wait."""
        return self._calls

    async def hand_over(
        self, collecting: Collecting, station_ids: Iterable[str] | None = None
    ) -> None:
        """Give a batch to the handler, or settle its stations as rejected. Never waits for the handler.

        Args:
            collecting: the batch.
            station_ids: those of it that joined since it was handed over: they get a call of their own, or go with the
                one of their batch that waits in the lane. None: all.
        """
        batch = collecting.batch
        job = Job(collecting, list(batch.entries if station_ids is None else station_ids))
        if job.station_ids and not self._take(job):
            reason = (
                f"{self._queue_capacity} calls of the batch handler run or wait "
                "(stations.queue_capacity)"
            )
            await self._settle(
                collecting,
                (
                    StationResult(station_id, Outcome.REJECTED, None, reason)
                    for station_id in job.station_ids
                ),
            )
        await trio.lowlevel.checkpoint()

    def expected_wait_s(
        self,
        station_ids: Iterable[str],  # noqa: ARG002 - a lane has them all
        /,
        *,
        topic: str,
    ) -> float:
        """Estimate when a batch given to the handler now would be answered.

        Args:
            station_ids: does not matter here.
            topic: whose lane.

        Returns:
            (Batches in the lane + 1) x mean seconds of a call; 0 for an idle lane, infinity for one that works on its
            first batch, 0 for one that is not healthy (its batches end at their deadlines). Without order always 0.
        """
        lane = self._lanes.get(topic)
        return 0.0 if lane is None else _wait_s(lane)

    def _take(self, job: Job) -> bool:
        batch = job.collecting.batch
        if not self._ordered:
            if self._calls >= self._queue_capacity:
                return False
            self._nursery.start_soon(self._call_once, job, name=f"batch handler {batch.batch_id}")
        else:
            lane = self._lanes.get(batch.topic)
            if lane is None:
                lane = self._start(batch.topic)
            waiting = lane.waiting.get(job.collecting)
            if waiting is not None:
                waiting.station_ids.extend(job.station_ids)
                return True
            try:
                lane.send.send_nowait(job)
            except trio.WouldBlock:
                return False
            lane.waiting[job.collecting] = job
            lane.calls += 1
        self._calls += 1
        return True

    def _start(self, topic: str) -> Lane:
        send, receive = trio.open_memory_channel[Job](self._queue_capacity)
        lane = self._lanes[topic] = Lane(send)
        self._nursery.start_soon(self._serve, lane, receive, name=f"lane {topic}")
        return lane

    async def _serve(self, lane: Lane, receive: trio.MemoryReceiveChannel[Job]) -> None:
        async for job in receive:
            del lane.waiting[job.collecting]
            started = trio.current_time()
            if not job.collecting.closed and started < job.collecting.deadline:
                if await self._run(job):
                    seconds = trio.current_time() - started
                    known = seconds if lane.mean_s is None else lane.mean_s
                    lane.mean_s = known + _WEIGHT * (seconds - known)
                    lane.strikes = 0
                else:
                    lane.strikes += 1
            lane.calls -= 1
            self._calls -= 1
            self._on_eased()

    async def _call_once(self, job: Job) -> None:
        await self._run(job)
        self._calls -= 1

    async def _run(self, job: Job) -> bool:
        try:
            return await self._call(job)
        except BaseException as error:
            if not is_cancellation(error):
                self._on_crash()  # before the others are cancelled: their errors then are no answers
            raise

    async def _call(self, job: Job) -> bool:  # noqa: ASYNC910 - a handler that never waits has its turn
        """Call the handler once; return whether it ended by itself (or when all were reported)."""
        collecting, station_ids = job.collecting, job.station_ids
        batch = collecting.batch
        answers = Answers(job, most_bytes=self._result_bytes, observer=self._observer)
        entries, last_message = batch.entries, batch.last_message
        problem: Exception | None = None
        with trio.CancelScope(deadline=collecting.deadline) as scope:  # noqa: ASYNC912
            collecting.begin_call(answers.expected, scope.cancel)
            if len(station_ids) == len(entries):  # tables only grow: these are all
                own = attrs.evolve(batch, entries=dict(entries), last_message=dict(last_message))
            else:
                own = attrs.evolve(
                    batch,
                    entries={name: entries[name] for name in station_ids},
                    last_message={name: last_message[name] for name in station_ids},
                )
            try:
                returned = await self._handler(own, answers.report)
                if returned is not None:
                    kind = type(returned).__name__
                    problem = TypeError(f"returned {kind}; results go through report()")
            except Exception as error:
                if is_fatal(error):
                    raise
                problem = error
            except BaseExceptionGroup as group:
                errors, rest = group.split(Exception)
                if errors is not None and is_fatal(errors):
                    raise
                problem = errors
                if rest is not None:
                    raise rest from None
            finally:
                unreported = answers.end()
        was_cut = scope.cancel_called and bool(unreported)
        if problem is not None:
            self._observer.observe(
                BatchHandlerTrouble(
                    batch_id=batch.batch_id, error=problem, unreported=len(unreported)
                )
            )
        if unreported and not collecting.closed and (problem is not None or not was_cut):
            failure = (
                failure_of("", problem)
                if problem is not None
                else StationResult("", Outcome.FAILED, None, "the batch handler did not report it")
            )
            await self._settle(
                collecting,
                (attrs.evolve(failure, station_id=station_id) for station_id in unreported),
            )
        if not was_cut:  # else it is the closing that says what became of them
            collecting.end_call(scope.cancel)
        return not was_cut  # noqa: ASYNC910

    async def _settle(self, collecting: Collecting, results: Iterable[StationResult]) -> None:
        for number, result in enumerate(results, 1):
            if collecting.closed:
                break
            collecting.settle(result)
            if not number % _SLICE:
                await trio.lowlevel.checkpoint()
        await trio.lowlevel.checkpoint()


def _wait_s(lane: Lane) -> float:
    if lane.strikes or not lane.calls:
        return 0.0
    if lane.mean_s is None:
        return math.inf
    return (lane.calls + 1) * lane.mean_s


class Answers:
    """What one call reported, and of whom it has yet to."""

    __slots__ = ("_collecting", "_ended", "_most_bytes", "_observer", "_open", "expected")

    def __init__(self, job: Job, *, most_bytes: int, observer: Observer) -> None:
        self.expected: frozenset[str] = frozenset(job.station_ids)
        self._collecting = job.collecting
        self._most_bytes = most_bytes
        self._observer = observer
        self._open = dict.fromkeys(job.station_ids)
        self._ended = False

    def report(self, station_id: str, answer: Mapping[str, Any] | Exception | None, /) -> None:
        """Take one station's answer, see `stationmaster.abc.Report`."""
        collecting = self._collecting
        if station_id not in self._open:
            batch_id = collecting.batch.batch_id
            if station_id in self.expected:
                raise ValueError(f"station {station_id} of {batch_id} was reported before")
            raise ValueError(f"this call for batch {batch_id} has no station {station_id!r}")
        failure = answer if isinstance(answer, BaseException) else None
        if failure is not None and (not isinstance(failure, Exception) or is_fatal(failure)):
            raise failure  # no answer of a station: it ends the pipeline
        del self._open[station_id]
        if collecting.closed or self._ended:
            batch_id = collecting.batch.batch_id
            self._observer.observe(LateResult(batch_id=batch_id, station_id=station_id))
            return
        if failure is not None:
            result = failure_of(station_id, failure)
        else:
            try:
                result = answer_of(station_id, answer, most_bytes=self._most_bytes)
            except Exception as error:
                if is_fatal(error):
                    raise
                result = failure_of(station_id, error)
        collecting.settle(result)

    def end(self) -> tuple[str, ...]:
        """Take note that the call ended; return the stations that it did not report."""
        self._ended = True
        return tuple(self._open)


@asynccontextmanager
async def open_batch_lanes(
    handler: BatchHandler,
    *,
    ordered: bool,
    queue_capacity: int,
    result_bytes: int,
    on_eased: Callable[[], None],
    on_crash: Callable[[], None],
    observer: Observer,
) -> AsyncIterator[BatchLanes]:
    """Own the calls of a batch handler; leaving the block cancels them.

    Args:
        handler: called once per batch.
        ordered: one call at a time for each topic, in the order of opening; else all at once.
        queue_capacity: batches that may run or wait, per topic if ordered.
        result_bytes: bound of one encoded result.
        on_eased: called when an expected wait may have fallen.
        on_crash: called before an error that is no outcome (MemoryError, a bug) takes everything down.
        observer: hears of late reports and of calls that fail.
    """
    async with trio.open_nursery() as nursery:
        yield BatchLanes(
            nursery,
            handler,
            ordered=ordered,
            queue_capacity=queue_capacity,
            result_bytes=result_bytes,
            on_eased=on_eased,
            on_crash=on_crash,
            observer=observer,
        )
        nursery.cancel_scope.cancel()
