"""Handlers that misbehave: each harms its own station, for as long as it does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs
import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from stationmaster.abc import NullObserver
from stationmaster.batch import Outcome, StationInput
from stationmaster.collector import Collector
from stationmaster.errors import DeadlineUnreachableError, QueueFullError
from stationmaster.events import LateResult
from stationmaster.testing import RecordingObserver
from tests.telemetry import NOON, batch, closed, live_tasks, message, run, stations_of, submit

if TYPE_CHECKING:
    from collections.abc import Mapping


async def test_a_result_after_closing_is_counted_as_late_and_dropped(
    autojump_clock: MockClock,
) -> None:
    async def handle(station: StationInput) -> Mapping[str, Any]:
        if station.batch_id == "air_0_0_0":
            with trio.CancelScope(shield=True):
                await trio.sleep(5.5)
        return {"of": station.batch_id}

    observer = RecordingObserver()
    async with stations_of(handle, breaker_failures=2) as stations:
        results = await run(stations, "A", "B", observer=observer)
        assert results["A"].outcome is Outcome.TIMED_OUT
        behind = submit(stations, "A", offset=1)
        result = (await closed(behind))["A"]
        assert trio.current_time() == 5.5
        assert result.value == {"of": "air_0_1_0"}
    late = observer.of(LateResult)
    assert {(event.batch_id, event.station_id) for event in late} == {
        ("air_0_0_0", "A"),
        ("air_0_0_0", "B"),
    }


async def test_a_handler_that_never_ends_even_if_cancelled_costs_one_job_and_then_nobody_any_time(
    autojump_clock: MockClock,
) -> None:
    released = trio.Event()

    async def handle(station: StationInput) -> None:
        if station.station_id == "A":
            with trio.CancelScope(shield=True):
                await released.wait()

    async with stations_of(handle) as stations:
        assert (await run(stations, "A", "B"))["A"].outcome is Outcome.TIMED_OUT
        await trio.sleep(1.5)
        began = trio.current_time()
        for offset in range(1, 200):
            results = await run(stations, "A", "B", offset=offset)
            assert results["A"].outcome is Outcome.REJECTED
            assert results["B"].outcome is Outcome.NO_OUTPUT
        assert trio.current_time() == began
        released.set()
        await wait_all_tasks_blocked()
        assert (await run(stations, "A", offset=200))["A"].outcome is Outcome.NO_OUTPUT


async def test_a_handler_that_blocks_the_loop_times_nobody_out_who_answers_in_the_end(
    autojump_clock: MockClock,
) -> None:
    async def handle(station: StationInput) -> None:
        if station.station_id == "A":
            autojump_clock.jump(1)  # nothing else runs meanwhile
        else:
            await trio.sleep(0.5)

    observer = RecordingObserver()
    async with stations_of(handle, breaker_failures=1, observer=observer) as stations:
        for offset in range(5):
            results = await run(stations, *"ABC", offset=offset)
            assert {result.outcome for result in results.values()} == {Outcome.NO_OUTPUT}
    assert observer.events == []


async def test_a_blocked_loop_makes_a_decision_late_and_nobody_is_harmed_for_longer(
    autojump_clock: MockClock,
) -> None:
    async def handle(station: StationInput) -> None:
        if station.batch_id == "air_0_0_0":
            if station.station_id == "A":
                autojump_clock.jump(6)
            await trio.sleep(0.5)

    async with stations_of(handle, breaker_failures=2) as stations:
        results = await run(stations, *"ABC")
        assert {result.outcome for result in results.values()} == {Outcome.TIMED_OUT}
        results = await run(stations, *"ABC", offset=1)
        assert {result.outcome for result in results.values()} == {Outcome.NO_OUTPUT}


async def test_tasks_that_a_handler_leaks_end_with_its_station(autojump_clock: MockClock) -> None:
    async def leak() -> None:
        await trio.sleep_forever()

    async def handle(station: StationInput) -> None:
        station.nursery.start_soon(leak, name=f"leak of {station.station_id}")

    async with stations_of(handle, idle_s=10) as stations:
        for offset in range(20):
            await run(stations, "A", "B", offset=offset)
        assert sum(name.startswith("leak") for name in live_tasks()) == 40
        await trio.sleep(20)
        assert len(stations) == 0
        assert not any(name.startswith("leak") for name in live_tasks())


async def test_a_result_of_ten_megabytes_fails_its_station_only() -> None:
    async def handle(station: StationInput) -> Mapping[str, Any]:
        return {"x": "y" * (10_000_000 if station.station_id == "A" else 10)}

    async with stations_of(handle, result_bytes=1_048_576) as stations:
        results = await run(stations, "A", "B")
    assert results["A"].outcome is Outcome.FAILED
    assert results["A"].reason.endswith("limit 1048576 (limits.result_bytes)")
    assert results["A"].encoded == b""
    assert results["B"].outcome is Outcome.SUCCEEDED


async def test_what_a_handler_does_to_its_readings_reaches_no_other_station() -> None:
    seen: dict[str, list[Mapping[str, Any]]] = {}

    async def handle(station: StationInput) -> Mapping[str, Any]:
        seen[station.station_id] = [dict(reading) for reading in station.readings]
        for reading in station.readings:
            assert isinstance(reading, dict)
            reading.clear()
            reading["x"] = station.station_id
        return station.readings[0]

    parsed = message({"stationId": "A", "x": 1}, {"stationId": "B", "x": 2})
    entries = dict(zip(parsed.station_ids, [(one,) for one in parsed.readings], strict=True))
    async with stations_of(handle) as stations:
        opened = attrs.evolve(batch("A", "B"), entries=entries, deadline=trio.current_time() + 5)
        collector = Collector(
            opened,
            opened=trio.current_time(),
            quorum=1.0,
            report_bytes=10**6,
            observer=NullObserver(),
        )
        await stations.hand_over(collector)
        results = await closed(collector)
    assert seen == {"A": [{"x": 1}], "B": [{"x": 2}]}
    assert {name: result.value for name, result in results.items()} == {
        "A": {"x": "A"},
        "B": {"x": "B"},
    }


async def test_a_result_that_its_handler_changes_later_was_encoded_before() -> None:
    kept: dict[str, Any] = {"x": 1}

    async def handle(station: StationInput) -> Mapping[str, Any]:
        return kept

    async with stations_of(handle) as stations:
        collector = submit(stations, "A")
        await collector.done.wait()
        kept["x"] = "changed"
        report = collector.close(closed_at=NOON)
    assert report.results[0].encoded == b'{"stationId":"A","x":1}'


@pytest.mark.parametrize(
    ("error", "outcome", "reason"),
    [
        (
            DeadlineUnreachableError("needs 2 s, has 1 s"),
            Outcome.REJECTED,
            "DeadlineUnreachableError: needs 2 s, has 1 s",
        ),
        (
            ExceptionGroup("", [DeadlineUnreachableError("needs 2 s, has 1 s")]),
            Outcome.REJECTED,
            "DeadlineUnreachableError: needs 2 s, has 1 s",
        ),
        (
            QueueFullError(capacity=8, retry_after_s=0.1),
            Outcome.FAILED,
            "QueueFullError: the queue of 8 rows is full; try again in 0.1 s",
        ),
    ],
    ids=["cannot end in time", "in a group of one", "another refusal"],
)
async def test_what_the_batcher_says_cannot_end_in_time_is_rejected_and_not_failed(
    error: Exception, outcome: Outcome, reason: str
) -> None:
    async def handle(station: StationInput) -> None:
        raise error

    async with stations_of(handle) as stations:
        result = (await run(stations, "A"))["A"]
    assert (result.outcome, result.reason) == (outcome, reason)
