"""Topics with rules of their own: deadline, quorum, priority, roster."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import trio

from stationmaster.batch import ClosedBy, Outcome
from stationmaster.errors import ConfigError
from stationmaster.events import BatchOpened, EmptyBatch
from stationmaster.pipeline import open_pipeline
from stationmaster.reports import encode_report
from stationmaster.service.upload_form import read_upload
from stationmaster.settings import PipelineSettings, TopicSettings
from stationmaster.testing import MemorySource, RecordingObserver, RecordingSink
from tests.pipelines import never
from tests.telemetry import message_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping

    from trio.testing import MockClock

    from stationmaster.abc import StationHandler
    from stationmaster.batch import BatchReport, StationInput
    from stationmaster.settings import PipelineStatistics

ROSTER = ["A", "B", "C", "D"]


async def at_once(station: StationInput) -> Mapping[str, Any]:
    return {}


async def run(
    source: MemorySource, handler: StationHandler = at_once, **settings: Any
) -> tuple[RecordingSink, RecordingObserver, PipelineStatistics]:
    source.end()
    sink, observer = RecordingSink(), RecordingObserver()
    async with open_pipeline(
        source,
        handler=handler,
        sink=sink,
        settings=PipelineSettings(**settings),
        observer=observer,
    ) as pipeline:
        await pipeline.wait_finished()
    return sink, observer, pipeline.statistics()


def outcomes(report: BatchReport) -> dict[str, str]:
    return {item.station_id: item.outcome.value for item in report.results}


async def test_each_topic_has_its_own_deadline_and_quorum(autojump_clock: MockClock) -> None:
    async def half(station: StationInput) -> Mapping[str, Any]:
        if station.station_id in "AB":
            await trio.sleep_forever()
        return {}

    source = MemorySource()
    for topic in ("air", "wind", "sun"):
        source.put(topic, 0, message_bytes(*ROSTER))
    sink, _, _ = await run(
        source,
        half,
        topics={"wind": TopicSettings(deadline_s=2.0), "sun": TopicSettings(quorum=0.5)},
    )
    closed = {
        report.batch.topic: (report.closed_by, report.duration_s)
        for report in sink.reports.values()
    }
    assert closed == {
        "air": (ClosedBy.DEADLINE, 5.0),
        "wind": (ClosedBy.DEADLINE, 2.0),
        "sun": (ClosedBy.QUORUM, 0.0),
    }


async def test_high_priority_goes_first_and_keeps_the_order_of_its_partition(
    autojump_clock: MockClock,
) -> None:
    source = MemorySource()
    for number in range(3):
        source.put("air", 0, message_bytes(f"a{number}"))
    for number in range(3):
        source.put("alarm", number % 2, message_bytes(f"b{number}"))
    _, observer, _ = await run(source, topics={"alarm": TopicSettings(priority="high")})
    opened = [event.batch for event in observer.of(BatchOpened)]
    assert [batch.batch_id for batch in opened] == [
        "alarm_0_0_0",
        "alarm_0_1_0",
        "alarm_1_0_0",
        "air_0_0_0",
        "air_0_1_0",
        "air_0_2_0",
    ]


async def test_high_priority_does_not_wait_for_stations_of_another_topic(
    autojump_clock: MockClock,
) -> None:
    async def slow(station: StationInput) -> Mapping[str, Any]:
        await trio.sleep(2.0 if station.topic == "air" else 0.1)
        return {}

    source = MemorySource()
    for _ in range(4):
        source.put("alarm", 0, message_bytes("slow"))
        source.put("air", 0, message_bytes("A"))
    _, observer, _ = await run(source, slow, topics={"alarm": TopicSettings(priority="high")})
    opened = [event.batch.topic for event in observer.of(BatchOpened)]
    assert opened[:2] == ["alarm", "air"]  # the second alarm waits for its station, air does not
    assert sorted(opened) == ["air"] * 4 + ["alarm"] * 4


async def test_a_high_deadline_is_the_shorter_one_unless_the_topic_has_its_own(
    autojump_clock: MockClock,
) -> None:
    source = MemorySource()
    for topic in ("air", "alarm", "own"):
        source.put(topic, 0, message_bytes("A" + topic))
    sink, _, _ = await run(
        source,
        never,
        topics={
            "alarm": TopicSettings(priority="high"),
            "own": TopicSettings(priority="high", deadline_s=4.0),
        },
    )
    durations = {r.batch.topic: r.duration_s for r in sink.reports.values()}
    assert durations == {"air": 5.0, "alarm": 3.0, "own": 4.0}


# -------------------------------------------------------------------------------------------------------------- roster


async def test_who_is_on_the_roster_and_in_no_message_is_missing_and_nobody_waits(
    autojump_clock: MockClock,
) -> None:
    source = MemorySource()
    source.put("air", 0, message_bytes("C", "X", "A"))
    sink, _, statistics = await run(source, topics={"air": TopicSettings(roster=ROSTER)})
    report = sink.reports["air_0_0_0"]
    assert outcomes(report) == {
        "C": "succeeded",
        "X": "succeeded",
        "A": "succeeded",
        "B": "missing",
        "D": "missing",
    }
    assert report.closed_by is ClosedBy.COMPLETE
    assert trio.current_time() == 0
    assert statistics.missing == 2
    body = encode_report(report)
    read_upload(body, encoding="", key="air_0_0_0")  # the referee of the form agrees
    assert b'{"stationId":"B","outcome":"missing","reason":"no data in the batch"}' in body
    assert b'"missing":2' in body
    assert b"followUp" not in body


async def test_with_a_poll_as_a_batch_the_roster_is_that_of_the_poll(
    autojump_clock: MockClock,
) -> None:
    source = MemorySource()
    source.put("air", 0, message_bytes("A"))
    source.put("air", 0, message_bytes("B", "A"))
    sink, _, statistics = await run(source, by="poll", roster=ROSTER)
    (report,) = sink.reports.values()
    assert outcomes(report) == {
        "A": "succeeded",
        "B": "succeeded",
        "C": "missing",
        "D": "missing",
    }
    assert statistics.duplicates == 1


@pytest.mark.parametrize("upload_empty", [False, True])
async def test_an_empty_message_with_a_roster_completes_at_once(
    upload_empty: bool, autojump_clock: MockClock
) -> None:
    source = MemorySource()
    source.put("air", 0, message_bytes())
    sink, observer, _ = await run(source, roster=ROSTER, upload_empty=upload_empty)
    assert trio.current_time() == 0
    assert source.committed == {("air", 0): 1}
    assert bool(observer.of(EmptyBatch)) == (not upload_empty)
    reports = list(sink.reports.values())
    assert len(reports) == upload_empty
    assert all(report.counts[Outcome.MISSING] == 4 for report in reports)


async def test_the_stations_of_a_roster_are_there_before_the_first_message() -> None:
    source = MemorySource()
    async with open_pipeline(
        source,
        handler=at_once,
        sink=RecordingSink(),
        settings=PipelineSettings(roster=["A", "B"], topics={"air": TopicSettings(roster=ROSTER)}),
    ) as pipeline:
        await trio.testing.wait_all_tasks_blocked()
        assert pipeline.statistics().live_stations == 4


# ------------------------------------------------------------------------------------------------------------- corners


async def test_a_burst_of_five_hundred_messages_in_one_poll_loses_and_times_out_nobody(
    autojump_clock: MockClock,
) -> None:
    async def handle(station: StationInput) -> Mapping[str, Any]:
        await trio.sleep(0.05)
        return {}

    source = MemorySource(max_poll_messages=500)
    for _ in range(500):
        source.put("air", 0, message_bytes(*ROSTER))
    sink, _, _ = await run(source, handle)
    assert len(sink.reports) == 500
    assert all(r.closed_by is ClosedBy.COMPLETE for r in sink.reports.values())
    assert source.committed == {("air", 0): 500}


async def test_quorum_and_deadline_in_one_tick_make_one_report_that_fits_its_counts(
    autojump_clock: MockClock,
) -> None:
    async def handle(station: StationInput) -> Mapping[str, Any]:
        await trio.sleep(9.0 if station.station_id == "A" else 5.0)
        return {}

    source = MemorySource()
    source.put("air", 0, message_bytes(*ROSTER))
    sink, _, _ = await run(source, handle, quorum=0.75)
    (report,) = sink.attempts
    reached = report.counts[Outcome.SUCCEEDED] >= 3
    assert report.closed_by is (ClosedBy.QUORUM if reached else ClosedBy.DEADLINE)
    assert report.duration_s == 5.0


async def test_an_answer_after_the_end_of_its_batch_is_counted(autojump_clock: MockClock) -> None:
    async def stubborn(station: StationInput) -> Mapping[str, Any]:
        with trio.CancelScope(shield=True):
            await trio.sleep(6.0)
        return {}

    source = MemorySource()
    source.put("air", 0, message_bytes("A", "B"))
    async with open_pipeline(source, handler=stubborn, sink=RecordingSink()) as pipeline:
        await trio.sleep(7.0)
        assert pipeline.statistics().late_results == 2


def test_the_faults_of_topics_name_them_and_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        PipelineSettings(
            quorum=2.0,
            roster=["", "x" * 129],
            topics={
                "a": TopicSettings(by="timestamp", roster=()),
                "b": TopicSettings(deadline_s=0, quorum=0.0, priority="low"),  # type: ignore[arg-type]
                "c": TopicSettings(by="hour", roster=["\n"]),  # type: ignore[arg-type]
                "d": TopicSettings(deadline_s=1_000),
            },
        )
    assert list(caught.value.faults) == [
        "quorum: 2.0 is not in 0 < quorum <= 1",
        "roster: '': station-id-blank",
        f"roster: {'x' * 129!r}: station-id-too-long",
        "idle_s: 600 is not above deadline_s (1000)",
        "topics['a'].roster: is empty; by = 'timestamp' needs one, or it cannot tell who is still to come",
        "topics['b'].deadline_s: 0 is not above 0",
        "topics['b'].priority: 'low' is none of normal, high",
        "topics['b'].quorum: 0.0 is not in 0 < quorum <= 1",
        "topics['c'].by: 'hour' is none of message, poll, timestamp",
        "topics['c'].roster: '\\n': station-id-blank",
    ]


async def test_a_batch_knows_how_many_of_its_messages_named_another_topic() -> None:
    source = MemorySource()
    source.put("air", 0, message_bytes("A", topic="wind"))
    source.put("air", 0, message_bytes("A", topic="air"))
    sink, _, _ = await run(source, by="poll")
    (report,) = sink.reports.values()
    assert report.batch.mislabelled == 1
