"""The pipeline in good days: deadlines, order, quorum, catching up, and the end of a source."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from stationmaster.abc import Rejected
from stationmaster.batch import ClosedBy, Outcome
from stationmaster.errors import ConfigError
from stationmaster.events import (
    BatchClosed,
    BatchOpened,
    EmptyBatch,
    MessageRefused,
    OffsetsCommitted,
    UploadDone,
    UploadRejected,
)
from stationmaster.messages import Limits
from stationmaster.pipeline import open_pipeline
from stationmaster.settings import PipelineSettings
from stationmaster.state import open_state
from stationmaster.testing import MemorySource, RecordingObserver, RecordingSink
from tests.pipelines import never
from tests.telemetry import NOON, message_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from stationmaster.abc import StationHandler
    from stationmaster.batch import StationInput

TWELVE = [f"S{number:02}" for number in range(12)]


def source_of(*values: bytes | None) -> MemorySource:
    """A bounded source of one partition."""
    source = MemorySource()
    for value in values:
        source.put("air", 0, value)
    source.end()
    return source


async def run(
    source: MemorySource,
    handler: StationHandler,
    sink: RecordingSink | None = None,
    **settings: Any,
) -> tuple[RecordingSink, RecordingObserver]:
    """Run a bounded source to its end."""
    sink, observer = sink or RecordingSink(), RecordingObserver()
    async with open_pipeline(
        source,
        handler=handler,
        sink=sink,
        settings=PipelineSettings(**settings),
        observer=observer,
        now=lambda: NOON,
    ) as pipeline:
        await pipeline.wait_finished()
    return sink, observer


def sleeping(seconds: float) -> StationHandler:
    async def handle(station: StationInput) -> Mapping[str, Any]:
        await trio.sleep(seconds)
        return {}

    return handle


# ----------------------------------------------------------------------------------------------------------- one batch


async def test_twelve_stations_take_as_long_as_the_slowest_of_them(
    autojump_clock: MockClock,
) -> None:
    async def handle(station: StationInput) -> Mapping[str, Any]:
        await trio.sleep((0.8, 0.4, 0.6)[int(station.station_id[1:]) % 3])
        return {"at": trio.current_time(), **station.readings[0]}

    source = source_of(message_bytes(*({"stationId": name, "x": 1} for name in TWELVE)))
    sink, observer = await run(source, handle)
    assert trio.current_time() == pytest.approx(0.8)
    report = sink.reports["air_0_0_0"]
    assert report.closed_by is ClosedBy.COMPLETE
    assert report.duration_s == pytest.approx(0.8)
    assert (report.batch.opened_at, report.closed_at) == (NOON, NOON)
    assert [result.station_id for result in report.results] == TWELVE
    assert [result.value for result in report.results[:3]] == [
        {"at": 0.8, "x": 1},
        {"at": 0.4, "x": 1},
        {"at": 0.6, "x": 1},
    ]
    assert source.committed == {("air", 0): 1}
    assert [event.lateness_s for event in observer.of(BatchClosed)] == [0]
    assert [event.in_flight for event in observer.of(BatchOpened)] == [1]


async def test_a_stuck_station_is_named_and_the_batch_leaves_at_its_deadline_to_the_tick(
    autojump_clock: MockClock,
) -> None:
    async def handle(station: StationInput) -> Mapping[str, Any]:
        if station.station_id == "S05":
            await trio.sleep_forever()
        await trio.sleep(0.5)
        return {}

    sink, observer = await run(source_of(message_bytes(*TWELVE)), handle)
    report = sink.reports["air_0_0_0"]
    assert report.closed_by is ClosedBy.DEADLINE
    assert report.counts[Outcome.SUCCEEDED] == 11
    late = [item.station_id for item in report.results if item.outcome is Outcome.TIMED_OUT]
    assert late == ["S05"]
    (closed,) = observer.of(BatchClosed)
    assert closed.lateness_s == 0
    assert report.duration_s == 5.0
    assert trio.current_time() == 5.0


async def test_a_station_that_fails_or_says_nothing_or_talks_nonsense_holds_up_no_other(
    autojump_clock: MockClock,
) -> None:
    async def handle(station: StationInput) -> Any:
        match station.station_id:
            case "fails":
                raise ValueError("bad sensor")
            case "none":
                return None
            case "nonsense":
                return {"x": object()}
        return {}

    sink, _ = await run(source_of(message_bytes("fails", "good", "none", "nonsense")), handle)
    assert [item.outcome for item in sink.reports["air_0_0_0"].results] == [
        Outcome.FAILED,
        Outcome.SUCCEEDED,
        Outcome.NO_OUTPUT,
        Outcome.FAILED,
    ]
    assert trio.current_time() == 0


async def test_a_batch_in_which_nobody_succeeds_is_uploaded_too(autojump_clock: MockClock) -> None:
    source = source_of(message_bytes("A", "B"))
    sink, _ = await run(source, sleeping(9))
    assert sink.reports["air_0_0_0"].counts[Outcome.TIMED_OUT] == 2
    assert source.committed == {("air", 0): 1}


@pytest.mark.parametrize("_round", range(5))
async def test_a_last_result_in_the_tick_of_the_deadline_makes_one_report_that_fits_its_counts(
    autojump_clock: MockClock, _round: int
) -> None:
    async def handle(station: StationInput) -> Mapping[str, Any]:
        await trio.sleep_until(station.deadline)
        return {}

    sink, observer = await run(source_of(message_bytes("A", "B")), handle)
    assert len(observer.of(BatchClosed)) == len(sink.attempts) == 1
    report = sink.reports["air_0_0_0"]
    complete = report.counts[Outcome.SUCCEEDED] == 2
    assert (report.closed_by is ClosedBy.COMPLETE) == complete
    assert sum(report.counts.values()) == 2
    assert trio.current_time() == 5.0


async def test_a_quorum_of_one_half_leaves_when_half_of_the_stations_answered(
    autojump_clock: MockClock,
) -> None:
    async def handle(station: StationInput) -> Mapping[str, Any]:
        await trio.sleep(int(station.station_id[1:]) / 10)
        return {}

    sink, _ = await run(source_of(message_bytes(*TWELVE)), handle, quorum=0.5)
    report = sink.reports["air_0_0_0"]
    assert report.closed_by is ClosedBy.QUORUM
    assert report.duration_s == pytest.approx(0.5)
    assert (report.counts[Outcome.SUCCEEDED], report.counts[Outcome.TIMED_OUT]) == (6, 6)
    assert trio.current_time() == pytest.approx(0.5)


# --------------------------------------------------------------------------------------------------------- many batches


async def test_a_backlog_of_a_thousand_messages_times_nobody_out(autojump_clock: MockClock) -> None:
    values = [message_bytes(*TWELVE)] * 1_000
    source = source_of(*values)
    sink, observer = await run(source, sleeping(0.2), max_in_flight=64)
    assert len(sink.reports) == 1_000
    assert sum(report.counts[Outcome.SUCCEEDED] for report in sink.reports.values()) == 12_000
    assert source.committed == {("air", 0): 1_000}
    # No station ever waited for work: a thousand jobs of 0.2 s, one after another.
    assert trio.current_time() == pytest.approx(200)
    assert max(event.in_flight for event in observer.of(BatchOpened)) <= 64


async def test_a_stuck_station_does_not_slow_the_others_down_in_a_backlog(
    autojump_clock: MockClock,
) -> None:
    async def handle(station: StationInput) -> Mapping[str, Any]:
        await trio.sleep(1_000 if station.station_id == "S05" else 0.2)
        return {}

    source = source_of(*[message_bytes(*TWELVE)] * 200)
    sink, _ = await run(source, handle)
    assert sum(report.counts[Outcome.SUCCEEDED] for report in sink.reports.values()) == 200 * 11
    # 40 s is what the others need; the first and the last batch wait for their deadline besides.
    assert trio.current_time() < 40 + 5


async def test_a_batch_larger_than_a_slice_gives_every_station_its_job(
    autojump_clock: MockClock,
) -> None:
    names = [f"S{number}" for number in range(1_000)]
    sink, _ = await run(source_of(message_bytes(*names)), sleeping(1))
    assert sink.reports["air_0_0_0"].counts[Outcome.SUCCEEDED] == 1_000
    assert trio.current_time() == pytest.approx(1)


async def test_a_poison_message_between_good_ones_is_told_and_passed_over() -> None:
    source = source_of(message_bytes("A"), b'{"stationData": [[', None, message_bytes("A"))
    sink, observer = await run(source, sleeping(0))
    assert set(sink.reports) == {"air_0_0_0", "air_0_3_0"}
    assert [event.record.offset for event in observer.of(MessageRefused)] == [1, 2]
    assert source.committed == {("air", 0): 4}


async def test_a_hostile_message_ends_nothing() -> None:
    levels = 2_000
    hidden = b'["]",' * levels + b'"["' + b'],"["' * (levels - 1) + b"]"
    source = source_of(b'{"stationData": [], "x": ' + hidden + b"}", message_bytes("A"))
    sink, observer = await run(source, sleeping(0))
    assert set(sink.reports) == {"air_0_1_0"}
    assert [event.reason for event in observer.of(MessageRefused)] == ["json-too-deep"]


async def test_a_batch_without_stations_is_accounted_for_and_not_uploaded() -> None:
    source = source_of(message_bytes(), message_bytes("A"))
    sink, observer = await run(source, sleeping(0))
    assert set(sink.reports) == {"air_0_1_0"}
    [empty] = observer.of(EmptyBatch)
    assert (empty.batch.batch_id, empty.batch.follow_up) == ("air_0_0_0", False)
    assert empty.batch.deadline <= trio.current_time()
    assert source.committed == {("air", 0): 2}


async def test_a_batch_without_stations_is_uploaded_where_that_is_wished() -> None:
    sink, observer = await run(source_of(message_bytes()), sleeping(0), upload_empty=True)
    assert sink.reports["air_0_0_0"].results == ()
    assert sink.reports["air_0_0_0"].closed_by is ClosedBy.COMPLETE
    assert not observer.of(EmptyBatch)


async def test_an_upload_that_is_refused_for_good_goes_on_with_the_next() -> None:
    source = source_of(message_bytes("A"), message_bytes("A"))
    sink = RecordingSink([Rejected(status=400, answer="no")])
    _, observer = await run(source, sleeping(0), sink)
    assert len(observer.of(UploadRejected)) == len(observer.of(UploadDone)) == 1
    assert source.committed == {("air", 0): 2}


async def test_a_batch_is_accounted_for_only_after_its_delivery(autojump_clock: MockClock) -> None:
    observer = RecordingObserver()
    source = MemorySource(observer=observer)
    for _ in range(20):
        source.put("air", 0, message_bytes("A"))
    source.end()
    async with open_pipeline(
        source, handler=sleeping(0.1), sink=RecordingSink(), observer=observer
    ) as pipeline:
        await pipeline.wait_finished()
    delivered: set[int] = set()
    for event in observer.events:
        if isinstance(event, UploadDone):
            delivered.add(event.report.batch.ranges[0].first)
        elif isinstance(event, OffsetsCommitted):
            assert set(range(event.offsets[0].last + 1)) <= delivered
    assert len(delivered) == source.committed["air", 0] == 20


async def test_one_batch_per_poll_joins_what_a_station_sent() -> None:
    seen: list[tuple[Any, ...]] = []

    async def handle(station: StationInput) -> None:
        seen.append(station.readings)

    values = [message_bytes({"stationId": "A", "x": number}) for number in range(3)]
    source = source_of(values[0], b"poison", values[1], values[2])
    sink, _ = await run(source, handle, by="poll", group_id="group")
    assert seen == [({"x": 0}, {"x": 1}, {"x": 2})]
    assert len(sink.reports) == 1
    assert source.committed == {("air", 0): 4}


async def test_a_report_names_the_traces_that_its_messages_belong_to() -> None:
    source = MemorySource()
    source.put("air", 0, message_bytes("A"), headers=(("traceparent", b"00-one-two-01"),))
    source.put("air", 0, message_bytes("A"))
    source.end()
    sink, _ = await run(source, sleeping(0))
    assert [report.batch.traceparents for report in sink.reports.values()] == [
        ("00-one-two-01",),
        (),
    ]


async def test_statistics_show_what_is_open(autojump_clock: MockClock) -> None:
    value = message_bytes("A", "B")
    source = source_of(value, value)
    async with open_pipeline(source, handler=sleeping(1), sink=RecordingSink()) as pipeline:
        before = pipeline.statistics()
        assert (before.in_flight, before.live_stations, before.draining) == (0, 0, False)
        assert before.oldest_deadline == math.inf
        await wait_all_tasks_blocked()
        during = pipeline.statistics()
        assert (during.in_flight, during.in_flight_bytes) == (1, len(value))
        assert during.live_stations == 2
        assert during.oldest_deadline == 5.0
        await pipeline.wait_finished()
        after = pipeline.statistics()
        assert (after.in_flight, after.in_flight_bytes, after.draining) == (0, 0, False)
        assert pipeline.dropped == 0


# ------------------------------------------------------------------------------------------------------------ settings


def test_settings_are_checked_all_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        PipelineSettings(
            deadline_s=0,
            quorum=1.5,
            grace_s=float("nan"),
            max_in_flight=9,
            queue_capacity=8,
            by="hour",  # type: ignore[arg-type]
        )
    assert list(caught.value.faults) == [
        "deadline_s: 0 is not above 0",
        "by: 'hour' is none of message, poll, timestamp",
        "quorum: 1.5 is not in 0 < quorum <= 1",
        "grace_s: nan is below 0",
        "queue_capacity: 8 is below max_in_flight (9)",
    ]
    with pytest.raises(ConfigError) as caught:
        PipelineSettings(job_timeout_s=0, breaker_failures=-1, high_priority_deadline_s=-1)
    assert list(caught.value.faults) == [
        "high_priority_deadline_s: -1 is not above 0",
        "job_timeout_s: 0 is not above 0",
        "breaker_failures: -1 is below 0",
    ]
    with pytest.raises(ConfigError, match=r"idle_s: 5 is not above deadline_s \(5\)"):
        PipelineSettings(idle_s=5.0)


def test_the_defaults_are_one_batch_per_message_and_five_seconds_for_everybody() -> None:
    settings = PipelineSettings()
    assert (settings.by, settings.deadline_s, settings.quorum) == ("message", 5.0, 1.0)
    assert settings.limits == Limits()


async def test_the_table_of_a_state_file_is_told_from_an_outbox_at_the_door(tmp_path: Path) -> None:
    async with open_state(tmp_path / "state.db") as state:
        with pytest.raises(TypeError, match=r"`stationmaster.state.open_outbox` makes one"):
            async with open_pipeline(
                source_of(),
                handler=sleeping(0),
                sink=RecordingSink(),
                outbox=state.outbox,  # type: ignore[arg-type]
            ):
                raise AssertionError("it was opened")


async def test_an_error_of_a_source_at_the_very_start_ends_the_pipeline(
    autojump_clock: MockClock,
) -> None:
    class Refusing(MemorySource):
        def watch_withdrawals(self, *args: object, **more: object) -> None:  # type: ignore[explicit-override]
            raise TypeError("I know nothing of that")

    with trio.fail_after(1000), pytest.raises(TypeError, match="I know nothing of that"):
        async with open_pipeline(Refusing(), handler=never, sink=RecordingSink()) as pipeline:
            await pipeline.wait_finished()
