"""Plain functions as handlers: real threads, events instead of sleeps, a clock that only a test moves."""

from __future__ import annotations

import os
import sys
import threading
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from stationmaster.batch import Outcome, StationInput
from stationmaster.events import LateResult, ThreadAbandoned, ThreadReturned
from stationmaster.testing import RecordingObserver
from stationmaster.threads import ThreadedHandler, _Call, _State
from tests.telemetry import batch, closed, run, stations_of, submit

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

    from stationmaster.abc import BlockingHandler
    from stationmaster.events import Event
    from stationmaster.stations import Stations

EventT = TypeVar("EventT")


class Watcher:
    """Records, and lets a test wait for an event."""

    detailed = False

    def __init__(self) -> None:
        self.recorded = RecordingObserver()
        self._next = trio.Event()

    def observe(self, event: Event, /) -> None:
        self.recorded.observe(event)
        self._next.set()
        self._next = trio.Event()

    def of(self, kind: type[EventT]) -> list[EventT]:
        return self.recorded.of(kind)

    async def wait_for(self, kind: type[Event]) -> None:
        while not self.of(kind):
            await self._next.wait()


class Gate:
    """A handler that blocks its thread until it is let through."""

    def __init__(self) -> None:
        self.started = trio.Event()
        self.passage = threading.Event()
        self.calls: list[str] = []
        self.running = 0
        self.most = 0
        self._lock = threading.Lock()

    def handle(self, station: StationInput) -> Mapping[str, Any]:
        with self._lock:
            self.running += 1
            self.most = max(self.most, self.running)
            self.calls.append(station.batch_id)
        trio.from_thread.run_sync(self.started.set)
        self.passage.wait()
        with self._lock:
            self.running -= 1
        return {"passed": True}

    async def wait_started(self) -> None:
        """Wait for one more call."""
        await self.started.wait()
        self.started = trio.Event()


@pytest.fixture
async def gate() -> AsyncIterator[Gate]:
    made = Gate()
    yield made
    made.passage.set()  # whatever the test did: no thread stays behind


@asynccontextmanager
async def threaded(
    handle: BlockingHandler, *, threads: int = 32, **settings: Any
) -> AsyncIterator[tuple[Stations, ThreadedHandler, Watcher]]:
    watcher = Watcher()
    handler = ThreadedHandler(handle, threads=threads, observer=watcher)
    async with stations_of(handler, observer=watcher, **settings) as stations:
        yield stations, handler, watcher


async def test_a_plain_function_runs_in_a_thread_named_after_its_station() -> None:
    def handle(station: StationInput) -> dict[str, Any]:
        thread = threading.current_thread()
        return {"thread": thread.name, "main": thread is threading.main_thread()}

    async with threaded(handle) as (stations, _, _):
        results = await run(stations, "S1")
    assert results["S1"].value == {"thread": "station S1", "main": False}


async def test_what_it_returns_or_raises_is_the_outcome_as_with_async_handlers() -> None:
    def handle(station: StationInput) -> Any:
        match station.station_id:
            case "none":
                return None
            case "raises":
                raise ValueError("no such turbine")
            case "number":
                return 7
        return {"big": "x" * 10_000_000}

    async with threaded(handle) as (stations, _, watcher):
        results = await run(stations, "none", "raises", "number", "large")
    told = {name: (result.outcome, result.reason) for name, result in results.items()}
    assert told == {
        "none": (Outcome.NO_OUTPUT, "the handler returned None"),
        "raises": (Outcome.FAILED, "ValueError: no such turbine"),
        "number": (Outcome.FAILED, "the handler returned int, expected a mapping or None"),
        "large": (
            Outcome.FAILED,
            "the result has 10000030 bytes, limit 10000 (limits.result_bytes)",
        ),
    }
    assert not watcher.recorded.events


async def test_a_function_that_returns_a_coroutine_fails_with_a_word_on_why() -> None:
    async def answer() -> None: ...

    async with threaded(lambda _: answer()) as (stations, _, _):  # type: ignore[arg-type, return-value]
        results = await run(stations, "S1")
    assert results["S1"].outcome is Outcome.FAILED
    assert "appears to be asynchronous" in results["S1"].reason


async def test_memory_that_runs_out_in_a_thread_ends_the_pipeline() -> None:
    def handle(station: StationInput) -> None:
        raise MemoryError

    with pytest.RaisesGroup(MemoryError, flatten_subgroups=True):
        async with threaded(handle) as (stations, _, _):
            await run(stations, "S1")


async def test_stations_block_beside_each_other_up_to_the_number_of_threads(
    mock_clock: MockClock, gate: Gate
) -> None:
    async with threaded(gate.handle, threads=2) as (stations, handler, _):
        collector = submit(stations, "S1", "S2", "S3")
        while gate.running < 2:
            await gate.wait_started()
        await wait_all_tasks_blocked()
        assert gate.running == 2
        places = handler._limiter.statistics()  # a third thread may only be slow to begin
        assert (places.borrowed_tokens, places.tasks_waiting) == (2, 1)
        gate.passage.set()
        results = await closed(collector)
    assert {result.outcome for result in results.values()} == {Outcome.SUCCEEDED}
    assert gate.most == 2


async def test_a_thread_that_outlives_its_batch_is_left_behind_and_its_result_is_late(
    mock_clock: MockClock, gate: Gate
) -> None:
    async with threaded(gate.handle, threads=7) as (stations, handler, watcher):
        collector = submit(stations, "S1", observer=watcher)
        await gate.wait_started()
        mock_clock.jump(5)
        results = await closed(collector)
        assert results["S1"].outcome is Outcome.TIMED_OUT
        await watcher.wait_for(ThreadAbandoned)
        assert watcher.of(ThreadAbandoned) == [
            ThreadAbandoned(batch_id="air_0_0_0", station_id="S1", abandoned=1, threads=7)
        ]
        assert handler.abandoned == 1

        mock_clock.jump(3)
        gate.passage.set()
        await watcher.wait_for(ThreadReturned)
        assert watcher.of(ThreadReturned) == [
            ThreadReturned(
                batch_id="air_0_0_0", station_id="S1", abandoned=0, seconds=3.0, error=None
            )
        ]
        assert watcher.of(LateResult) == [LateResult(batch_id="air_0_0_0", station_id="S1")]
        assert handler.abandoned == 0


async def test_a_station_stays_busy_until_its_abandoned_thread_has_really_ended(
    mock_clock: MockClock, gate: Gate
) -> None:
    async with threaded(gate.handle) as (stations, _, watcher):
        first = submit(stations, "S1", offset=1)
        await gate.wait_started()
        mock_clock.jump(5)
        await closed(first)
        await watcher.wait_for(ThreadAbandoned)

        second = submit(stations, "S1", "S2", offset=2)
        await gate.wait_started()  # of S2: another station is not concerned
        await wait_all_tasks_blocked()
        assert gate.calls == ["air_0_1_0", "air_0_2_0"]
        mock_clock.jump(5)
        results = await closed(second)
        assert results["S1"].outcome is Outcome.TIMED_OUT  # when its time had come, and not called

        third = submit(stations, "S1", offset=3)
        await wait_all_tasks_blocked()
        assert gate.calls == ["air_0_1_0", "air_0_2_0"]
        gate.passage.set()
        results = await closed(third)
        assert results["S1"].outcome is Outcome.SUCCEEDED
        assert gate.calls == ["air_0_1_0", "air_0_2_0", "air_0_3_0"]


async def test_a_station_that_was_given_up_and_made_anew_waits_for_its_old_thread_too(
    mock_clock: MockClock, gate: Gate
) -> None:
    async with threaded(gate.handle, max_live=1) as (stations, _, watcher):
        first = submit(stations, "S1", offset=1)
        await gate.wait_started()
        mock_clock.jump(5)
        await closed(first)
        await watcher.wait_for(ThreadAbandoned)
        await wait_all_tasks_blocked()
        gone = submit(stations, "S2", offset=2)  # there is one place: S1 is idle, and goes
        await gate.wait_started()
        mock_clock.jump(5)
        await closed(gone)
        await wait_all_tasks_blocked()

        again = submit(stations, "S1", offset=3)
        await wait_all_tasks_blocked()
        assert gate.calls == ["air_0_1_0", "air_0_2_0"]
        gate.passage.set()
        assert (await closed(again))["S1"].outcome is Outcome.SUCCEEDED


async def test_abandoned_threads_keep_their_places_so_there_are_never_more_than_allowed(
    mock_clock: MockClock, gate: Gate
) -> None:
    async with threaded(gate.handle, threads=2) as (stations, handler, watcher):
        first = submit(stations, "S1", "S2")
        while gate.running < 2:
            await gate.wait_started()
        mock_clock.jump(5)
        await closed(first)
        await wait_all_tasks_blocked()
        assert [event.abandoned for event in watcher.of(ThreadAbandoned)] == [1, 2]

        second = submit(stations, "S3", offset=2)
        await wait_all_tasks_blocked()
        mock_clock.jump(5)
        assert (await closed(second))["S3"].outcome is Outcome.TIMED_OUT
        await wait_all_tasks_blocked()
        assert handler.abandoned == 2  # the third was given up before it began: it left no thread
        assert len(gate.calls) == 2

        gate.passage.set()
        assert (await run(stations, "S3", offset=3))["S3"].outcome is Outcome.SUCCEEDED
    assert gate.most == 2


async def test_a_function_that_asks_ends_with_its_job_and_is_not_late(
    mock_clock: MockClock,
) -> None:
    started, given_up = trio.Event(), threading.Event()

    def handle(station: StationInput) -> None:
        trio.from_thread.run_sync(started.set)
        given_up.wait()
        trio.from_thread.check_cancelled()

    async with threaded(handle) as (stations, _, watcher):
        collector = submit(stations, "S1", observer=watcher)
        await started.wait()
        mock_clock.jump(5)
        assert (await closed(collector))["S1"].outcome is Outcome.TIMED_OUT
        await watcher.wait_for(ThreadAbandoned)
        given_up.set()
        await watcher.wait_for(ThreadReturned)
        assert isinstance(watcher.of(ThreadReturned)[0].error, trio.Cancelled)
        assert not watcher.of(LateResult)


async def test_an_error_of_an_abandoned_thread_is_told_with_its_return(
    mock_clock: MockClock,
) -> None:
    started, given_up = trio.Event(), threading.Event()
    error = MemoryError()

    def handle(station: StationInput) -> None:
        trio.from_thread.run_sync(started.set)
        given_up.wait()
        raise error

    async with threaded(handle) as (stations, _, watcher):
        collector = submit(stations, "S1")
        await started.wait()
        mock_clock.jump(5)
        await closed(collector)
        await watcher.wait_for(ThreadAbandoned)
        given_up.set()
        await watcher.wait_for(ThreadReturned)
        assert watcher.of(ThreadReturned)[0].error is error


async def test_a_thread_that_begins_after_its_job_was_given_up_does_not_call_the_handler() -> None:
    called = threading.Event()

    def handle(station: StationInput) -> None:
        called.set()

    watcher = Watcher()
    handler = ThreadedHandler(handle, threads=1, observer=watcher)
    made = batch("S1")
    station = StationInput("S1", made.entries["S1"], made, made.last_message["S1"])
    busy, leave = trio.Event(), threading.Event()

    def occupy() -> None:
        trio.from_thread.run_sync(busy.set)
        leave.wait()

    async with trio.open_nursery() as nursery:
        # The only place is taken: the call waits for it, and is cancelled meanwhile.
        nursery.start_soon(lambda: trio.to_thread.run_sync(occupy, limiter=handler._limiter))
        await busy.wait()
        with trio.CancelScope() as scope:
            nursery.start_soon(_cancel_when_blocked, scope)
            await handler(station)
        leave.set()
    assert scope.cancelled_caught
    assert handler.abandoned == 0
    assert not called.is_set()
    assert not watcher.recorded.events


async def test_an_end_in_the_moment_of_the_cancellation_is_late_and_leaves_nothing() -> None:
    made = batch("S1")
    station = StationInput("S1", made.entries["S1"], made, made.last_message["S1"])
    token = trio.lowlevel.current_trio_token()

    def handle(station: StationInput) -> None:
        call = sys._getframe(1).f_locals["self"]

        def cancel_and_see_it_end() -> None:
            scope.cancel()
            while call._state is not _State.ENDED:
                os.sched_yield()  # nothing else runs in trio's thread before it has ended

        token.run_sync_soon(cancel_and_see_it_end)

    watcher = Watcher()
    handler = ThreadedHandler(handle, threads=1, observer=watcher)
    with trio.CancelScope() as scope:
        await handler(station)
    assert scope.cancelled_caught
    assert handler.abandoned == 0
    assert watcher.recorded.events == [LateResult(batch_id="air_0_0_0", station_id="S1")]


async def test_a_thread_that_begins_too_late_finds_its_job_given_up() -> None:
    called: list[StationInput] = []
    made = batch("S1")
    station = StationInput("S1", made.entries["S1"], made, made.last_message["S1"])

    def note(job: StationInput) -> None:
        called.append(job)

    call = _Call(note, station, lambda _: None)
    assert call.give_up() is _State.GIVEN_UP
    assert call.run() is None
    assert call.give_up() is _State.GIVEN_UP
    assert not called


async def _cancel_when_blocked(scope: trio.CancelScope) -> None:
    await wait_all_tasks_blocked()
    scope.cancel()


def test_the_end_waits_for_no_thread_and_nothing_is_heard_of_it_later() -> None:
    passage, ended = threading.Event(), threading.Event()
    watchers: list[Watcher] = []

    async def main() -> None:
        started = trio.Event()

        def handle(station: StationInput) -> None:
            trio.from_thread.run_sync(started.set)
            passage.wait()
            threading.current_thread()
            ended.set()

        async with threaded(handle) as (stations, _, watcher):
            watchers.append(watcher)
            submit(stations, "S1")
            await started.wait()

    trio.run(main)  # comes back although the thread does not
    assert not ended.is_set()
    (watcher,) = watchers
    assert [event.abandoned for event in watcher.of(ThreadAbandoned)] == [1]
    passage.set()
    ended.wait()
    assert not watcher.of(ThreadReturned)
