"""One batch through a handler, for tests of handlers."""

from __future__ import annotations

import math
import threading
from typing import TYPE_CHECKING, Any

import pytest
import trio
from trio.testing import MockClock

from stationmaster import ClosedBy, Outcome, PipelineSettings
from stationmaster.events import BatchOpened, MessageRefused
from stationmaster.testing import RecordingObserver, run_batch, station_input, telemetry
from stationmaster.testing.clock import refuse_jumping_clock

if TYPE_CHECKING:
    from collections.abc import Mapping

    from stationmaster import Batch, BatchReport, StationInput, StationResult
    from stationmaster.abc import Report


async def handle(station: StationInput) -> Mapping[str, Any] | None:
    """Do as the reading says."""
    reading = station.readings[-1]
    await trio.sleep(reading.get("seconds", 0))
    if "error" in reading:
        raise ValueError(reading["error"])
    return reading.get("answer")


def outcomes(report: BatchReport) -> dict[str, Outcome]:
    return {result.station_id: result.outcome for result in report.results}


MIXED = telemetry(
    {"stationId": "S001", "answer": {"level": 1}, "seconds": 0.25},
    {"stationId": "S002", "seconds": math.nextafter(1e9, 0)},
    {"stationId": "S003", "error": "no data"},
    "S004",
)


async def test_each_station_has_its_outcome_and_a_hanging_one_costs_the_deadline(
    autojump_clock: MockClock,
) -> None:
    report = await run_batch(handle, MIXED)

    assert outcomes(report) == {
        "S001": Outcome.SUCCEEDED,
        "S002": Outcome.TIMED_OUT,
        "S003": Outcome.FAILED,
        "S004": Outcome.NO_OUTPUT,
    }
    assert report.results[0].value == {"level": 1}
    assert "no data" in report.results[2].reason
    assert (report.closed_by, report.duration_s) == (ClosedBy.DEADLINE, 5.0)
    assert trio.current_time() == 5.0


async def test_the_settings_and_the_topic_are_those_that_were_given(
    autojump_clock: MockClock,
) -> None:
    report = await run_batch(
        handle, MIXED, topic="air", settings=PipelineSettings(deadline_s=0.5, quorum=0.75)
    )

    assert report.batch.topic == "air"
    assert (report.closed_by, report.duration_s) == (ClosedBy.QUORUM, 0.25)


async def test_a_batch_handler_reports_station_by_station(autojump_clock: MockClock) -> None:
    async def handle_batch(batch: Batch, report: Report) -> None:
        report("S001", {"readings": len(batch.entries["S001"])})
        await trio.sleep_forever()

    report = await run_batch(handle_batch, telemetry("S001", "S001", "S002"))

    assert outcomes(report) == {"S001": Outcome.SUCCEEDED, "S002": Outcome.TIMED_OUT}
    assert report.results[0].value == {"readings": 2}


async def test_a_plain_function_that_hangs_in_its_thread_is_left_behind(
    mock_clock: MockClock,
) -> None:
    hangs, release = threading.Event(), threading.Event()

    def blocking(station: StationInput) -> dict[str, Any]:
        if station.station_id == "S002":
            hangs.set()
            release.wait(30)
        hangs.wait(30)
        return {}

    async def on_result(station: StationInput, result: StationResult) -> None:
        # The first answers when the other hangs: then it is time for its deadline, however late the machine is.
        await trio.lowlevel.checkpoint()
        if result.station_id == "S001":
            mock_clock.jump(1.0)

    report = await run_batch(
        blocking,
        telemetry("S001", "S002"),
        settings=PipelineSettings(deadline_s=1.0),
        on_result=on_result,
    )
    release.set()

    assert outcomes(report) == {"S001": Outcome.SUCCEEDED, "S002": Outcome.TIMED_OUT}


async def test_a_plain_function_is_refused_on_a_clock_that_jumps(autojump_clock: MockClock) -> None:
    def blocking(station: StationInput) -> None:
        pytest.fail("it must not be called")

    with pytest.raises(RuntimeError, match=r"works in a thread.*real clock"):
        await run_batch(blocking, telemetry("S001"))


async def test_a_jump_while_a_thread_of_the_handler_works_is_told(
    autojump_clock: MockClock,
) -> None:
    release = threading.Event()

    async def in_a_thread(station: StationInput) -> None:
        await trio.to_thread.run_sync(release.wait, 30, abandon_on_cancel=True)

    with pytest.raises(RuntimeError, match=r"jumped while a thread worked.*real clock"):
        await run_batch(in_a_thread, telemetry("S001"))
    release.set()


async def test_time_that_goes_by_while_no_thread_works_is_fine(autojump_clock: MockClock) -> None:
    report = await run_batch(handle, telemetry({"stationId": "S001", "seconds": 3}))

    assert report.duration_s == 3.0


async def test_a_thread_is_fine_on_a_clock_that_does_not_jump() -> None:
    async def in_a_thread(station: StationInput) -> None:
        await trio.to_thread.run_sync(int)

    report = await run_batch(in_a_thread, telemetry("S001"))

    assert report.counts[Outcome.NO_OUTPUT] == 1


def test_a_clock_that_only_runs_faster_is_fine() -> None:
    async def check() -> None:
        refuse_jumping_clock("it")
        await trio.lowlevel.checkpoint()

    trio.run(check, clock=MockClock(rate=10))
    trio.run(check)
    with pytest.raises(RuntimeError, match="it, and this clock jumps"):
        trio.run(check, clock=MockClock(autojump_threshold=0.01))


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (b"{", "refused: not-json"),
        (b'{"stationData": 1}', "refused: .*stationData"),
        (telemetry({"pm25": 9}), "refused: no-valid-entry .*station-id-missing"),
        (telemetry(), "names no station"),
    ],
)
async def test_a_message_that_makes_no_batch_says_why(message: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        await run_batch(handle, message)


async def test_a_result_hook_and_an_observer_have_heard_everything(
    autojump_clock: MockClock,
) -> None:
    heard: list[str] = []
    observer = RecordingObserver()

    async def on_result(station: StationInput, result: StationResult) -> None:
        await trio.sleep(1)
        heard.append(result.station_id)

    await run_batch(
        handle, telemetry("S001", "S002", "S003"), on_result=on_result, observer=observer
    )

    assert sorted(heard) == ["S001", "S002", "S003"]
    assert len(observer.of(BatchOpened)) == 1
    assert not observer.of(MessageRefused)


async def test_what_ends_a_service_comes_out_as_itself(autojump_clock: MockClock) -> None:
    async def starving(station: StationInput) -> None:
        raise MemoryError(station.station_id)

    with pytest.raises(MemoryError, match="S001"):
        await run_batch(starving, telemetry("S001"))


async def test_something_that_is_no_handler_is_refused() -> None:
    with pytest.raises(TypeError, match="no function"):
        await run_batch("handle", telemetry("S001"))  # type: ignore[arg-type]


async def test_a_cancelled_run_ends_with_the_grace(autojump_clock: MockClock) -> None:
    with trio.move_on_after(1) as scope:
        await run_batch(handle, MIXED, settings=PipelineSettings(grace_s=2))

    assert scope.cancelled_caught
    assert trio.current_time() == 3.0


# ------------------------------------------------------------------------------------------------- inputs made by hand


def test_an_input_made_by_hand_is_what_a_handler_gets() -> None:
    station = station_input(
        "S001",
        {"pm25": 4},
        {"pm25": 5},
        fields={"site": "Dongsi", "timestamp": "2024-01-01T12:00:00Z"},
        topic="air",
        deadline=7.0,
    )

    assert (station.station_id, station.topic, station.deadline) == ("S001", "air", 7.0)
    assert station.readings == ({"pm25": 4}, {"pm25": 5})
    assert station.fields["site"] == "Dongsi"
    assert station.timestamp.isoformat() == "2024-01-01T12:00:00+00:00"
    assert station.batch.entries == {"S001": station.readings}
    assert station.batch.duplicates == 1
    with pytest.raises(TypeError):
        station.fields["site"] = "elsewhere"  # type: ignore[index]
    with pytest.raises(RuntimeError, match="made by hand"):
        _ = station.nursery


async def test_an_input_made_by_hand_is_that_of_a_running_pipeline() -> None:
    got: list[StationInput] = []

    async def keep(station: StationInput) -> None:
        got.append(station)
        await trio.lowlevel.checkpoint()

    reading = {"pm25": 4, "nested": {"a": [1]}}
    await run_batch(keep, telemetry({"stationId": "S001", **reading}, unit="ug/m3"))
    [real] = got
    made = station_input("S001", reading, fields={"unit": "ug/m3"})

    for name in ("station_id", "readings", "batch_id", "topic", "timestamp", "fields"):
        assert getattr(made, name) == getattr(real, name), name
    for name in ("entries", "size_bytes", "duplicates", "bad_entries", "roster"):
        assert getattr(made.batch, name) == getattr(real.batch, name), name


def test_an_input_without_readings_has_one_without_data() -> None:
    assert station_input("S001").readings == ({},)


@pytest.mark.parametrize("station_id", ["", "x" * 10_000])
def test_an_input_that_no_handler_would_get_is_refused(station_id: str) -> None:
    with pytest.raises(ValueError, match="no handler would get this"):
        station_input(station_id)


def test_fields_that_no_message_may_have_are_refused() -> None:
    deep: dict[str, Any] = {}
    for _ in range(40):
        deep = {"deeper": deep}
    with pytest.raises(ValueError, match=r"no handler would get this: .*depth"):
        station_input("S001", fields=deep)


def test_a_reading_that_no_entry_may_hold_is_refused_although_others_are_fine() -> None:
    with pytest.raises(ValueError, match="no handler would get this"):
        station_input("S001", {"pm25": 4}, {"text": "x" * 100_000})


def test_a_field_cannot_take_the_place_of_the_stations() -> None:
    assert telemetry("S001", stationData=[]) == b'{"stationData":[{"stationId":"S001"}]}'
