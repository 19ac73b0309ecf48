"""Helper tasks that a handler leaves in its station's nursery."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import attrs
import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from stationmaster.batch import Outcome, StationInput
from stationmaster.events import LateResult, StationTrouble
from stationmaster.testing import RecordingObserver
from tests.telemetry import batch, closed, run, stations_of, submit

if TYPE_CHECKING:
    from collections.abc import Mapping


async def test_a_helper_task_lives_from_batch_to_batch_until_its_station_is_given_up(
    autojump_clock: MockClock,
) -> None:
    started: list[float] = []
    ended: list[float] = []

    async def watch() -> None:
        started.append(trio.current_time())
        try:
            await trio.sleep_forever()
        finally:
            ended.append(trio.current_time())

    async def handle(station: StationInput) -> None:
        if not started:
            station.nursery.start_soon(watch)
        await trio.sleep(1)

    async with stations_of(handle, idle_s=10) as stations:
        for _ in range(3):
            await run(stations, "A")
        assert started == [0]
        assert not ended
        await trio.sleep(20)
        assert len(stations) == 0
        assert ended == [15.0]


async def test_a_helper_outlives_the_deadline_of_the_batch_that_started_it(
    autojump_clock: MockClock,
) -> None:
    deadlines: list[float] = []

    async def note() -> None:
        await trio.sleep(50)
        deadlines.append(trio.current_effective_deadline())

    async def handle(station: StationInput) -> None:
        station.nursery.start_soon(note)
        await trio.sleep_forever()

    async with stations_of(handle) as stations:
        assert (await run(stations, "A"))["A"].outcome is Outcome.TIMED_OUT
        await trio.sleep(100)
    assert deadlines == [math.inf]


async def test_a_helper_that_fails_takes_the_job_at_hand_and_the_station_goes_on_anew(
    autojump_clock: MockClock,
) -> None:
    async def fail() -> None:
        await trio.sleep(1)
        raise ValueError("the helper lost its connection")

    async def handle(station: StationInput) -> Mapping[str, Any]:
        if station.station_id == "A" and station.batch_id == "air_0_0_0":
            station.nursery.start_soon(fail)
            await trio.sleep_forever()
        await trio.sleep(2)
        return {}

    observer = RecordingObserver()
    async with stations_of(handle, observer=observer) as stations:
        first, following = submit(stations, "A", "B"), submit(stations, "A", offset=1)
        results = await closed(first)
        assert results["A"].outcome is Outcome.FAILED
        assert results["A"].reason == "a helper task failed"
        assert results["B"].outcome is Outcome.SUCCEEDED
        assert trio.current_time() == 2
        assert (await closed(following))["A"].outcome is Outcome.SUCCEEDED
        assert trio.current_time() == 3
        assert len(stations) == 2
    (trouble,) = observer.of(StationTrouble)
    assert trouble.station_id == "A"
    assert isinstance(trouble.error, ExceptionGroup)
    assert isinstance(trouble.error.exceptions[0], ValueError)


async def test_a_helper_that_fails_during_a_shielded_job_does_not_harm_the_next_one(
    autojump_clock: MockClock,
) -> None:
    async def fail() -> None:
        await trio.sleep(1)
        raise ValueError("the helper lost its connection")

    async def handle(station: StationInput) -> Mapping[str, Any]:
        if station.batch_id == "air_0_0_0":
            station.nursery.start_soon(fail)
            with trio.CancelScope(shield=True):
                await trio.sleep(2)
            return {}
        await trio.sleep(1)
        return {}

    async with stations_of(handle) as stations:
        first, following = submit(stations, "A"), submit(stations, "A", offset=1)
        assert (await closed(first))["A"].outcome is Outcome.SUCCEEDED
        assert (await closed(following))["A"].outcome is Outcome.SUCCEEDED


async def test_a_helper_that_fails_while_its_station_is_idle_harms_no_job(
    autojump_clock: MockClock,
) -> None:
    fall = trio.Event()

    async def fail() -> None:
        await fall.wait()
        raise ValueError("the helper lost its connection")

    async def handle(station: StationInput) -> Mapping[str, Any]:
        if station.batch_id == "air_0_0_0":
            station.nursery.start_soon(fail)
        return {}

    observer = RecordingObserver()
    async with stations_of(handle, observer=observer, idle_s=10) as stations:
        await run(stations, "A")
        await run(stations, "B", offset=1)
        await trio.sleep(1)
        fall.set()
        await wait_all_tasks_blocked()
        assert len(observer.of(StationTrouble)) == 1
        assert (await run(stations, "A", offset=2))["A"].outcome is Outcome.SUCCEEDED
        await trio.sleep(20)
        assert len(stations) == 0  # idle since then, it is given up like any other


async def test_a_station_that_is_given_up_while_its_helpers_end_starts_no_more() -> None:
    fall = trio.Event()

    async def handle(station: StationInput) -> None:
        async def cancel_and_push_out() -> None:
            await fall.wait()
            station.nursery.cancel_scope.cancel()
            submit(stations, "B", offset=1)

        if station.station_id == "A":
            station.nursery.start_soon(cancel_and_push_out)

    async with stations_of(handle, max_live=1) as stations:
        await run(stations, "A")
        await wait_all_tasks_blocked()
        fall.set()
        await wait_all_tasks_blocked()
        assert len(stations) == 1
        assert (await run(stations, "B", offset=2))["B"].outcome is Outcome.NO_OUTPUT
        results = await run(stations, "A", offset=3)
    assert results["A"].outcome is Outcome.NO_OUTPUT


async def test_an_answer_that_comes_in_the_tick_of_its_helpers_failure_counts() -> None:
    async def handle(station: StationInput) -> Mapping[str, Any]:
        async def fail() -> None:
            raise ValueError("the helper lost its connection")

        station.nursery.start_soon(fail)
        with trio.CancelScope(shield=True):
            await wait_all_tasks_blocked()
        return {}

    observer = RecordingObserver()
    async with stations_of(handle, observer=observer) as stations:
        results = await run(stations, "A", observer=observer)
    assert results["A"].outcome is Outcome.SUCCEEDED
    assert len(observer.of(StationTrouble)) == 1
    assert not observer.of(LateResult)


async def test_a_helper_that_fails_after_its_batch_is_closed_is_no_late_answer(
    autojump_clock: MockClock,
) -> None:
    async def fail() -> None:
        await trio.sleep(5.1)
        raise ValueError("the helper lost its connection")

    async def handle(station: StationInput) -> None:
        station.nursery.start_soon(fail)
        try:
            await trio.sleep_forever()
        finally:
            with trio.CancelScope(shield=True):
                await trio.sleep(0.2)

    observer = RecordingObserver()
    async with stations_of(handle, observer=observer) as stations:
        await run(stations, "A", observer=observer)
        await trio.sleep(1)
    assert len(observer.of(StationTrouble)) == 1
    assert not observer.of(LateResult)


async def test_a_helper_that_runs_out_of_memory_ends_everything() -> None:
    async def fail() -> None:
        raise MemoryError

    async def handle(station: StationInput) -> None:
        station.nursery.start_soon(fail)
        await trio.sleep_forever()

    with pytest.RaisesGroup(MemoryError, flatten_subgroups=True):
        async with stations_of(handle) as stations:
            await run(stations, "A")


async def test_an_input_made_by_hand_has_no_nursery_and_says_so() -> None:
    by_hand = batch("A")
    station = StationInput("A", by_hand.entries["A"], by_hand, by_hand.last_message["A"])
    with pytest.raises(RuntimeError, match="station A has no task"):
        station.nursery  # noqa: B018 - the look is the test
    async with trio.open_nursery() as nursery:
        assert attrs.evolve(station, lend_nursery=lambda: nursery).nursery is nursery


def test_an_input_names_its_batch_and_its_message() -> None:
    by_hand = batch("A", offset=7)
    station = StationInput("A", by_hand.entries["A"], by_hand, by_hand.last_message["A"])
    assert (station.batch_id, station.topic, station.deadline) == ("air_0_7_0", "air", 5.0)
    assert station.fields == {}
    assert station.timestamp.timestamp() == 0
