"""The result hook by itself: its bounds, its errors and its end, on a virtual clock."""

from __future__ import annotations

import weakref
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import attrs
import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from stationmaster.batch import Outcome, StationInput, StationResult
from stationmaster.events import LateResult, ResultHookTrouble
from stationmaster.result_hook import HookQueue, open_result_hook
from stationmaster.testing import RecordingObserver
from tests.telemetry import closed, opened

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from trio.testing import MockClock

    from stationmaster.abc import ResultHook


def success(station_id: str, size: int = 100) -> StationResult:
    return StationResult(station_id, Outcome.SUCCEEDED, {}, "", b"x" * size)


@asynccontextmanager
async def hook_of(
    on_result: ResultHook,
    observer: RecordingObserver,
    *,
    max_bytes: int = 10_000,
    on_crash: Callable[[], None] = lambda: None,
) -> AsyncIterator[HookQueue]:
    async with open_result_hook(
        on_result, max_bytes=max_bytes, limit_s=2.0, on_crash=on_crash, observer=observer
    ) as queue:
        yield queue


def reasons(observer: RecordingObserver) -> list[tuple[str, str]]:
    return [(event.station_id, event.reason) for event in observer.of(ResultHookTrouble)]


class Slow:
    """A hook of so many seconds."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.heard: list[str] = []

    async def __call__(self, station: StationInput, result: StationResult) -> None:
        await trio.sleep(self.seconds)
        self.heard.append(station.station_id)


async def test_results_go_out_one_after_another_in_the_order_of_their_outcomes(
    autojump_clock: MockClock,
) -> None:
    hook, observer = Slow(0.25), RecordingObserver()
    async with hook_of(hook, observer) as queue:
        collector = opened("S1", "S2", "S3")
        heard = queue.overhear(collector)
        for station_id in ("S3", "S1", "S2"):
            heard.settle(success(station_id))
        await closed(collector)
        assert trio.current_time() == 0.0  # the batch waits for none of it
    assert hook.heard == ["S3", "S1", "S2"]
    assert trio.current_time() == 0.75
    assert not observer.events


async def test_a_second_outcome_and_a_late_one_are_not_heard(autojump_clock: MockClock) -> None:
    hook, observer = Slow(0), RecordingObserver()
    async with hook_of(hook, observer) as queue:
        collector = opened("S1", "S2", observer=observer, deadline_s=1)
        heard = queue.overhear(collector)
        heard.begin("S2", lambda: None)
        heard.settle(success("S1"))
        heard.settle(success("S1"))
        heard.end("S2")
        results = await closed(collector)
        assert heard.closed
        heard.settle(success("S2"))
    assert hook.heard == ["S1"]
    assert results["S2"].outcome is Outcome.TIMED_OUT
    assert len(observer.of(LateResult)) == 1  # counted as without a hook
    assert (heard.opened, heard.deadline) == (0.0, 1.0)
    assert heard.batch is collector.batch


async def test_what_does_not_fit_is_dropped_and_told_and_there_is_room_again_later(
    autojump_clock: MockClock,
) -> None:
    hook, observer = Slow(1), RecordingObserver()
    size = opened("S1", "S2", "S3", "S4").batch.size_bytes
    async with hook_of(hook, observer, max_bytes=size + 250) as queue:
        collector = opened("S1", "S2", "S3", "S4")
        heard = queue.overhear(collector)
        for station_id in ("S1", "S2", "S3"):
            heard.settle(success(station_id))
        assert reasons(observer) == [("S3", "full")]
        await trio.sleep(1.5)
        heard.settle(success("S4"))
    assert hook.heard == ["S1", "S2", "S4"]
    assert reasons(observer) == [("S3", "full")]


async def test_batches_that_wait_with_their_results_count_until_the_last_one_left(
    autojump_clock: MockClock,
) -> None:
    hook, observer = Slow(1), RecordingObserver()
    first, second, third = (opened("S1", offset=n) for n in range(3))
    size = first.batch.size_bytes
    async with hook_of(hook, observer, max_bytes=size + 150) as queue:
        queue.overhear(first).settle(success("S1"))
        queue.overhear(second).settle(success("S1"))
        assert len(reasons(observer)) == 1
        await trio.sleep(1.5)
        queue.overhear(third).settle(success("S1"))
    assert len(reasons(observer)) == 1
    assert len(hook.heard) == 2


async def test_room_comes_back_with_each_result_and_that_of_its_batch_with_the_last_one(
    autojump_clock: MockClock,
) -> None:
    hook, observer = Slow(1), RecordingObserver()
    names = [f"S{number}" for number in range(40)]
    first, second = opened(*names), opened(*names, offset=1)
    size = first.batch.size_bytes
    assert size > 500  # more than the results beside it
    async with hook_of(hook, observer, max_bytes=size + 200) as queue:
        heard = queue.overhear(first)
        for station_id in ("S0", "S1"):
            heard.settle(success(station_id))
        await trio.sleep(1.5)
        for station_id in ("S2", "S3"):
            heard.settle(success(station_id))
        assert reasons(observer) == [("S3", "full")]  # only what S0 had came back
        await trio.sleep(5)
        again = queue.overhear(second)
        for station_id in ("S4", "S5", "S6"):
            again.settle(success(station_id))
        assert reasons(observer) == [("S3", "full"), ("S6", "full")]
        await trio.sleep(5)
    assert hook.heard == ["S0", "S1", "S2", "S4", "S5"]


async def test_what_joins_counts_with_its_batch_from_the_next_result_to_the_last_that_waits(
    autojump_clock: MockClock,
) -> None:
    hook, observer = Slow(1), RecordingObserver()
    size = opened("S1", "S2", "S3").batch.size_bytes
    async with hook_of(hook, observer, max_bytes=2 * size + 250) as queue:
        for offset in range(3):
            collector = opened("S1", "S2", "S3", offset=offset)
            queue.overhear(collector).settle(success("S1"))
            collector.join([], size_bytes=size)
            queue.overhear(collector).settle(success("S2"))
            queue.overhear(collector).settle(success("S3"))
            assert reasons(observer) == [("S3", "full")] * (offset + 1)  # no more, no less room
            collector.batch = attrs.evolve(collector.batch, size_bytes=2 * size)
            await closed(collector)
            await trio.sleep(5)
    assert hook.heard == ["S1", "S2"] * 3


async def test_a_batch_that_others_join_is_overheard_as_one(autojump_clock: MockClock) -> None:
    async with hook_of(Slow(0), RecordingObserver()) as queue:
        collector, other = opened("S1", "S2"), opened("S1", offset=1)
        heard = queue.overhear(collector)
        assert queue.overhear(collector) is heard
        assert queue.overhear(other) is not heard
        gone = weakref.ref(collector.batch)
        del collector, heard
        assert gone() is None  # a batch that nobody holds any more is not kept for this


async def test_no_more_than_ten_thousand_results_wait(autojump_clock: MockClock) -> None:
    hook, observer = Slow(1), RecordingObserver()
    async with hook_of(hook, observer, max_bytes=10**9) as queue:
        names = [f"S{number}" for number in range(5_001)]
        for offset in (1, 2):
            heard = queue.overhear(opened(*names, offset=offset))
            for name in names:
                heard.settle(success(name))
        assert reasons(observer) == [("S4999", "full"), ("S5000", "full")]


async def test_an_error_of_the_hook_is_told_and_the_next_result_is_heard(
    autojump_clock: MockClock,
) -> None:
    heard_of = []

    async def on_result(station: StationInput, result: StationResult) -> None:
        heard_of.append(station.station_id)
        if station.station_id == "S1":
            raise ValueError("no such output")
        if station.station_id == "S2":
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.sleep_forever)
                raise OSError

    observer = RecordingObserver()
    async with hook_of(on_result, observer) as queue:
        heard = queue.overhear(opened("S1", "S2", "S3"))
        for station_id in ("S1", "S2", "S3"):
            heard.settle(success(station_id))
    assert heard_of == ["S1", "S2", "S3"]
    assert reasons(observer) == [("S1", "error"), ("S2", "error")]
    assert str(observer.of(ResultHookTrouble)[0].error) == "no such output"


async def test_a_call_that_takes_too_long_is_cut_and_told(autojump_clock: MockClock) -> None:
    async def on_result(station: StationInput, result: StationResult) -> None:
        if station.station_id == "S1":
            await trio.sleep_forever()
        if station.station_id == "S2":
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.sleep_forever)
                try:
                    await trio.sleep_forever()
                finally:
                    raise OSError  # mixed with the other's Cancelled

    observer = RecordingObserver()
    async with hook_of(on_result, observer) as queue:
        heard = queue.overhear(opened("S1", "S2", "S3"))
        for station_id in ("S1", "S2", "S3"):
            heard.settle(success(station_id))
        await trio.sleep(4.5)
    assert reasons(observer) == [("S1", "timeout"), ("S2", "error"), ("S2", "timeout")]
    assert trio.current_time() == 4.5


async def test_at_the_end_what_waits_has_the_time_of_one_call(autojump_clock: MockClock) -> None:
    hook, observer = Slow(0.8), RecordingObserver()
    async with hook_of(hook, observer) as queue:
        heard = queue.overhear(opened("S1", "S2", "S3", "S4"))
        for station_id in ("S1", "S2", "S3", "S4"):
            heard.settle(success(station_id))
    assert trio.current_time() == 2.0
    assert hook.heard == ["S1", "S2"]
    assert reasons(observer) == [("S3", "closing"), ("S4", "closing")]


async def test_cancelled_from_outside_it_ends_at_once_and_tells_what_it_missed(
    autojump_clock: MockClock,
) -> None:
    hook, observer = Slow(1), RecordingObserver()
    with trio.CancelScope() as scope:
        async with hook_of(hook, observer) as queue:
            heard = queue.overhear(opened("S1", "S2"))
            heard.settle(success("S1"))
            heard.settle(success("S2"))
            await wait_all_tasks_blocked()
            scope.cancel()
    assert trio.current_time() == 0.0
    assert reasons(observer) == [("S1", "closing"), ("S2", "closing")]


async def test_to_be_cancelled_is_no_crash(autojump_clock: MockClock) -> None:
    crashes: list[bool] = []
    with trio.move_on_after(1):
        async with hook_of(
            Slow(10), RecordingObserver(), on_crash=lambda: crashes.append(True)
        ) as queue:
            queue.overhear(opened("S1")).settle(success("S1"))
            await trio.sleep_forever()
    assert trio.current_time() == 1.0
    assert not crashes


async def test_the_hook_gets_the_station_as_the_handler_had_it(autojump_clock: MockClock) -> None:
    got: list[StationInput] = []

    async def on_result(station: StationInput, result: StationResult) -> None:
        got.append(station)

    collector = opened("S1", "S2")
    async with hook_of(on_result, RecordingObserver()) as queue:
        queue.overhear(collector).settle(success("S2"))
    [station] = got
    assert (station.station_id, station.batch) == ("S2", collector.batch)
    assert station.readings == collector.batch.entries["S2"]
    assert station.message is collector.batch.last_message["S2"]


class Weird(BaseException):
    """No Exception."""


@pytest.mark.parametrize(
    ("error", "left"),
    [
        (MemoryError(), [MemoryError]),
        (Weird(), [Weird]),
        (BaseExceptionGroup("", [MemoryError(), Weird()]), [MemoryError, Weird]),
        (BaseExceptionGroup("", [ValueError(), Weird()]), [Weird]),
        (BaseExceptionGroup("", [Weird(), Weird()]), [Weird, Weird]),
    ],
    ids=["memory", "weird", "memory-in-group", "weird-in-group", "weird-only"],
)
async def test_what_is_no_failure_of_the_hook_ends_the_pipeline(
    error: BaseException, left: list[type[BaseException]]
) -> None:
    async def on_result(station: StationInput, result: StationResult) -> None:
        raise error

    crashes: list[bool] = []
    with pytest.RaisesGroup(*left, flatten_subgroups=True):
        async with hook_of(
            on_result, RecordingObserver(), on_crash=lambda: crashes.append(True)
        ) as queue:
            queue.overhear(opened("S1")).settle(success("S1"))
            await trio.sleep_forever()
    assert crashes == [True]


async def test_an_outcome_that_comes_when_the_hook_was_stopped_is_dropped_and_told(
    autojump_clock: MockClock,
) -> None:
    observer = RecordingObserver()
    with trio.CancelScope() as stop:
        async with hook_of(Slow(1.0), observer) as queue:
            heard = queue.overhear(opened("S1", "S2"))
            heard.settle(success("S1"))
            stop.cancel()
            with trio.CancelScope(shield=True):
                await wait_all_tasks_blocked()  # the hook has heard it before the stations
                heard.settle(success("S2"))
    assert ("S2", "closing") in reasons(observer)
