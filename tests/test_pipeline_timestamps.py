"""Batches by timestamp: who joins, who follows, which offsets count, what waits."""

from __future__ import annotations

import random
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from stationmaster.batch import ClosedBy
from stationmaster.events import (
    BatchClosed,
    BatchJoined,
    BatchOpened,
    BatchWithdrawn,
    EmptyBatch,
    MessageRefused,
    ResultHookTrouble,
)
from stationmaster.pipeline import open_pipeline
from stationmaster.reports import encode_report
from stationmaster.service.upload_form import RefusedUploadError, read_upload
from stationmaster.settings import PipelineSettings, TopicSettings
from stationmaster.testing import MemorySource, RecordingObserver, RecordingSink
from stationmaster.testing.sink import Hang
from tests.telemetry import message_bytes

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

    from stationmaster.abc import Handler, Report, ResultHook
    from stationmaster.batch import Batch, BatchReport, StationInput, StationResult
    from stationmaster.pipeline import Pipeline

ROSTER = ["A", "B", "C"]
EIGHT, NINE, TEN = (f"2024-01-01T{hour:02}:00:00Z" for hour in (8, 9, 10))


async def at_once(station: StationInput) -> Mapping[str, Any]:
    return {"readings": [dict(reading) for reading in station.readings]}


class Setting:
    def __init__(self, **source: Any) -> None:
        self.source = MemorySource(**source)
        self.sink = RecordingSink()
        self.observer = RecordingObserver()

    def put(self, *stations: Any, at: str = EIGHT, partition: int = 0, topic: str = "air") -> int:
        return self.source.put(topic, partition, message_bytes(*stations, timestamp=at))

    @asynccontextmanager
    async def open(
        self,
        handler: Handler = at_once,
        *,
        on_result: ResultHook | None = None,
        **settings: Any,
    ) -> AsyncIterator[Pipeline]:
        async with open_pipeline(
            self.source,
            handler=handler,
            on_result=on_result,
            sink=self.sink,
            settings=PipelineSettings(**{"by": "timestamp", "roster": ROSTER, **settings}),
            observer=self.observer,
        ) as pipeline:
            yield pipeline

    async def run(self, handler: Handler = at_once, **settings: Any) -> None:
        self.source.end()
        async with self.open(handler, **settings) as pipeline:
            await pipeline.wait_finished()

    @property
    def reports(self) -> list[BatchReport]:
        return list(self.sink.reports.values())

    @property
    def opened(self) -> list[Batch]:
        return [event.batch for event in self.observer.of(BatchOpened)]


def spans(report: BatchReport) -> list[tuple[int, int, int]]:
    return [(r.partition, r.first, r.last) for r in report.batch.ranges]


def outcomes(report: BatchReport) -> dict[str, str]:
    return {item.station_id: item.outcome.value for item in report.results}


# -------------------------------------------------------------------------------------------------------------- joining


async def test_messages_of_one_time_join_across_polls_and_partitions(
    autojump_clock: MockClock,
) -> None:
    setting = Setting()
    async with setting.open() as pipeline:
        setting.put("A")
        await trio.sleep(1)
        setting.put("A", at=NINE)
        setting.put("B")
        await trio.sleep(1)
        setting.put("C", partition=1)
        await trio.sleep(0.5)
        (report,) = setting.reports
        assert report.closed_by is ClosedBy.COMPLETE
        assert outcomes(report) == dict.fromkeys(ROSTER, "succeeded")
        assert spans(report) == [(0, 0, 0), (0, 2, 2), (1, 0, 0)]
        assert report.duration_s == pytest.approx(2.0)
        assert not report.batch.follow_up
        # 09:00 is open still: offset 1 is a hole.
        assert setting.source.committed == {("air", 0): 1, ("air", 1): 1}
        assert pipeline.statistics().joined == 2
    assert setting.source.committed == {("air", 0): 3, ("air", 1): 1}
    assert outcomes(setting.reports[1]) == {"A": "succeeded", "B": "missing", "C": "missing"}


async def test_the_report_has_the_id_of_all_that_it_covers(autojump_clock: MockClock) -> None:
    setting = Setting(max_poll_messages=1)
    for station in ROSTER:
        setting.put(station)
    await setting.run()
    alone = Setting()
    alone.put("A")
    await alone.run()
    (report,) = setting.reports
    (first,) = alone.reports
    assert spans(report) == [(0, 0, 2)]
    assert report.batch.batch_id != first.batch.batch_id == alone.opened[0].batch_id
    (closed,) = setting.observer.of(BatchClosed)
    assert closed.report.batch.batch_id == report.batch.batch_id
    again = Setting()
    for station in ROSTER:
        again.put(station)
    await again.run()
    assert again.reports[0].batch.batch_id == report.batch.batch_id


async def test_the_report_tells_of_all_that_joined(autojump_clock: MockClock) -> None:
    setting = Setting(max_poll_messages=1)
    contents: list[dict[str, Any]] = [{}, {"topic": "wind"}, {"topic": "sun"}]
    values = [
        message_bytes(station, station, number, timestamp=EIGHT, **fields)
        for number, (station, fields) in enumerate(zip(ROSTER, contents, strict=True))
    ]
    for value in values:
        setting.source.put("air", 0, value)
    await setting.run()
    batch = setting.reports[0].batch
    assert len(setting.opened) == 1
    assert batch.size_bytes == sum(map(len, values))
    assert (batch.duplicates, batch.mislabelled) == (3, 2)
    assert len(batch.bad_entries) == 3


async def test_a_target_that_keeps_the_first_body_never_has_the_half_for_the_whole(
    autojump_clock: MockClock,
) -> None:
    setting = Setting(max_poll_messages=1)
    setting.sink.script.append(Hang(keeps=True))  # it has the batch, and we never hear of it
    async with setting.open(upload_timeout_s=99.0) as pipeline:
        setting.put("A")
        await trio.sleep(6)
        pipeline.drain(grace_s=0)
    assert setting.source.committed == {}
    setting.put("B")
    setting.source.lose([("air", 0)])
    setting.source.assign([("air", 0)])
    await setting.run()
    half, whole = setting.reports  # of the same first record, under two ids
    assert outcomes(half)["B"] == "missing"
    assert outcomes(whole) == {"A": "succeeded", "B": "succeeded", "C": "missing"}
    assert spans(half)[0][1] == spans(whole)[0][1] == 0


async def test_who_does_not_come_is_missing_at_the_deadline(autojump_clock: MockClock) -> None:
    setting = Setting()
    setting.put("A")
    setting.put("X")
    await setting.run()
    (report,) = setting.reports
    assert report.closed_by is ClosedBy.DEADLINE
    assert report.duration_s == 5.0
    assert outcomes(report) == {
        "A": "succeeded",
        "X": "succeeded",
        "B": "missing",
        "C": "missing",
    }


async def test_a_quorum_does_not_wait_for_the_rest_of_the_roster(autojump_clock: MockClock) -> None:
    setting = Setting()
    setting.put("A")
    setting.put("B")
    await setting.run(quorum=0.6)
    (report,) = setting.reports
    assert report.closed_by is ClosedBy.QUORUM
    assert outcomes(report)["C"] == "missing"
    assert trio.current_time() == 0


async def test_readings_that_come_before_their_stations_job_begins_reach_it_together(
    autojump_clock: MockClock,
) -> None:
    async def handle(station: StationInput) -> Mapping[str, Any]:
        await trio.sleep(1)
        return await at_once(station)

    setting = Setting()
    setting.put({"stationId": "A", "x": 0}, at=EIGHT)
    setting.put({"stationId": "A", "x": 1}, at=NINE)  # waits for the job of 08:00
    async with setting.open(handle, roster=["A"]) as pipeline:
        await trio.sleep(0.5)
        setting.put({"stationId": "A", "x": 2}, at=NINE)
        await trio.sleep(5)
        assert [report.results[0].value for report in setting.reports] == [
            {"readings": [{"x": 0}]},
            {"readings": [{"x": 1}, {"x": 2}]},
        ]
        assert pipeline.statistics().duplicates == 1


async def test_joining_takes_no_slot(autojump_clock: MockClock) -> None:
    setting = Setting(max_poll_messages=1)
    setting.put("A", at=EIGHT)
    setting.put("A", at=NINE)  # waits for the slot
    setting.put("B", at=EIGHT)
    setting.put("C", at=EIGHT)
    setting.put("B", at=NINE)
    setting.put("C", at=NINE)
    await setting.run(max_in_flight=1, queue_capacity=1)
    assert [report.closed_by for report in setting.reports] == [ClosedBy.COMPLETE] * 2
    assert trio.current_time() == 0
    assert setting.source.committed == {("air", 0): 6}


async def test_what_waits_for_a_slot_is_opened_with_the_oldest_first(
    autojump_clock: MockClock,
) -> None:
    setting = Setting()
    times = [TEN, NINE, "2024-01-01T13:00:00Z", "2024-01-01T12:30:00+01:00"]
    setting.put("A", at=EIGHT)
    for number, at in enumerate(times):
        setting.put("A", at=at, partition=1 + number)
    await setting.run(max_in_flight=1, queue_capacity=1, deadline_s=1.0)
    assert [batch.last_message["A"].timestamp.hour for batch in setting.opened] == [
        8,
        9,
        10,
        12,
        13,
    ]


async def test_times_in_different_notations_are_one(autojump_clock: MockClock) -> None:
    setting = Setting()
    setting.put("A", at="2024-01-01T08:00:00Z")
    setting.put("B", at="2024-01-01T09:00:00+01:00")
    setting.source.put("air", 0, message_bytes("C", timestamp=1_704_096_000_000))
    await setting.run()
    assert len(setting.reports) == 1


async def test_topics_of_one_time_do_not_meet(autojump_clock: MockClock) -> None:
    setting = Setting()
    setting.put("A", "B", "C", topic="air")
    setting.put("A", "B", "C", topic="wind")
    await setting.run()
    assert {report.batch.topic for report in setting.reports} == {"air", "wind"}


async def test_beside_topics_by_timestamp_others_are_as_always(autojump_clock: MockClock) -> None:
    setting = Setting()
    for _ in range(2):
        setting.put("A", topic="air")
        setting.put("B", topic="air")
        setting.put("S", topic="wind")
        setting.put("S", topic="sun")
    await setting.run(
        by="message",
        topics={"air": TopicSettings(by="timestamp"), "sun": TopicSettings(by="poll", roster=())},
    )
    wind = [report for report in setting.reports if report.batch.topic == "wind"]
    assert [report.batch.batch_id for report in wind] == ["wind_0_0_0", "wind_0_1_0"]
    (sun,) = [report for report in setting.reports if report.batch.topic == "sun"]
    assert spans(sun) == [(0, 0, 1)]
    assert setting.source.committed == {("air", 0): 4, ("wind", 0): 2, ("sun", 0): 2}


# ------------------------------------------------------------------------------------------------------------ following


async def test_a_message_of_a_closed_batch_opens_a_follow_up_that_says_so(
    autojump_clock: MockClock,
) -> None:
    setting = Setting()
    async with setting.open() as pipeline:
        setting.put("A", "B")
        await trio.sleep(6)
        setting.put("C")
        await wait_all_tasks_blocked()
        first, second = setting.reports
        assert outcomes(first)["C"] == "missing"
        assert outcomes(second) == {"C": "succeeded"}  # the others were waited for already
        assert second.batch.follow_up
        assert second.closed_by is ClosedBy.COMPLETE
        assert pipeline.statistics().follow_ups == 1
    assert setting.source.committed == {("air", 0): 2}
    body = encode_report(second)
    assert b'"followUp":true' in body
    assert b"followUp" not in encode_report(first)
    read_upload(body, encoding="", key=second.batch.batch_id)
    with pytest.raises(RefusedUploadError, match="followUp: expected true or false"):
        read_upload(
            body.replace(b'"followUp":true', b'"followUp":1'),
            encoding="",
            key=second.batch.batch_id,
        )


async def test_a_station_that_comes_again_after_its_job_began_has_a_follow_up_of_its_own(
    autojump_clock: MockClock,
) -> None:
    setting = Setting()
    async with setting.open():
        setting.put({"stationId": "A", "x": 1})
        await trio.sleep(1)
        setting.put({"stationId": "A", "x": 2})
        await trio.sleep(1)
        setting.put("B", "C")
        await trio.sleep(1)
    again, first = setting.reports
    assert again.results[0].value == {"readings": [{"x": 2}]}
    assert again.batch.follow_up
    assert outcomes(first) == dict.fromkeys(ROSTER, "succeeded")
    assert spans(first) == [(0, 0, 0), (0, 2, 2)]
    assert setting.source.committed == {("air", 0): 3}


async def test_a_batch_that_was_given_up_and_comes_again_is_no_follow_up(
    autojump_clock: MockClock,
) -> None:
    setting = Setting()
    async with setting.open():
        setting.put("A")
        await trio.sleep(1)
        setting.source.lose([("air", 0)])
        await trio.sleep(1)
        setting.source.assign([("air", 0)])
        await trio.sleep(6)
    assert len(setting.observer.of(BatchWithdrawn)) == 1
    (report,) = setting.reports
    assert not report.batch.follow_up
    assert setting.source.committed == {("air", 0): 1}


async def test_a_batch_that_loses_one_of_its_partitions_goes_on_for_the_other(
    autojump_clock: MockClock,
) -> None:
    setting = Setting()
    async with setting.open():
        setting.put("A", partition=0)
        setting.put("B", partition=1)
        await trio.sleep(1)
        setting.source.lose([("air", 0)])
        await trio.sleep(6)
        assert len(setting.reports) == 1
        assert setting.source.committed == {("air", 1): 1}


# --------------------------------------------------------------------------------------------------------- odd messages


async def test_an_empty_message_is_accounted_for_and_opens_nothing(
    autojump_clock: MockClock,
) -> None:
    setting = Setting()
    async with setting.open():
        setting.put()
        await trio.sleep(0.5)
        setting.put("A")
        await trio.sleep(0.5)
        setting.put()
        await trio.sleep(0.5)
        assert len(setting.observer.of(EmptyBatch)) == 2
        setting.put("B", "C")
        await trio.sleep(0.5)
    assert spans(setting.reports[0]) == [(0, 1, 1), (0, 3, 3)]
    assert setting.source.committed == {("air", 0): 4}


async def test_an_empty_message_that_waits_with_others_of_its_time_counts_with_them(
    autojump_clock: MockClock,
) -> None:
    setting = Setting()
    setting.put()
    setting.put("A", "B", "C")
    setting.put()
    await setting.run()
    assert not setting.observer.of(EmptyBatch)
    assert spans(setting.reports[0]) == [(0, 0, 2)]
    assert trio.current_time() == 0


async def test_a_refused_record_between_is_no_part_of_the_batch(autojump_clock: MockClock) -> None:
    setting = Setting()
    setting.put("A")
    setting.source.put("air", 0, b"poison")
    setting.put("B", "C")
    await setting.run()
    assert spans(setting.reports[0]) == [(0, 0, 0), (0, 2, 2)]
    assert len(setting.observer.of(MessageRefused)) == 1
    assert setting.source.committed == {("air", 0): 3}


async def test_a_batch_handler_is_called_again_for_those_that_join(
    autojump_clock: MockClock,
) -> None:
    calls: list[list[str]] = []

    async def handle_batch(batch: Batch, report: Report) -> None:
        calls.append(sorted(batch.entries))
        for station_id in batch.entries:
            report(station_id, {})

    setting = Setting()
    async with setting.open(handle_batch):
        setting.put("A")
        await trio.sleep(1)
        setting.put("C", "B")
        await trio.sleep(1)
        assert calls == [["A"], ["B", "C"]]
        assert outcomes(setting.reports[0]) == dict.fromkeys(ROSTER, "succeeded")


@pytest.mark.parametrize("hooked", [False, True])
async def test_messages_that_join_one_by_one_do_not_use_up_the_lane_of_a_batch_handler(
    autojump_clock: MockClock, hooked: bool
) -> None:
    calls: list[int] = []
    heard: list[str] = []

    async def handle_batch(batch: Batch, report: Report) -> None:
        calls.append(len(batch.entries))
        await trio.sleep(1)
        for station_id in batch.entries:
            report(station_id, {})

    async def on_result(station: StationInput, result: StationResult) -> None:
        heard.append(station.station_id)

    setting = Setting(max_poll_messages=1)
    names = [f"S{number}" for number in range(10)]
    for number, name in enumerate(names):
        setting.put(name, partition=number)
    on_each = on_result if hooked else None
    bounds = {"max_in_flight": 1, "queue_capacity": 1}
    await setting.run(handle_batch, on_result=on_each, roster=names, **bounds)
    assert outcomes(setting.reports[0]) == dict.fromkeys(names, "succeeded")
    assert len(calls) == 2
    assert sum(calls) == 10
    assert sorted(heard) == (names if hooked else [])


async def test_the_bound_of_the_result_hook_holds_for_what_joined_too(
    autojump_clock: MockClock,
) -> None:
    async def on_result(station: StationInput, result: StationResult) -> None:
        await trio.sleep(4)

    setting = Setting(max_poll_messages=1)
    rows = [{"stationId": name, "pad": "x" * 5_000} for name in ROSTER]
    for row in rows:
        setting.put(row)
    # Its three results wait with 15,000 bytes of their batch and 15,000 of their own.
    async with setting.open(on_result=on_result, max_in_flight_bytes=35_000):
        await trio.sleep(1)
        setting.put(rows[0], at=NINE)
        await trio.sleep(1)
        missed = setting.observer.of(ResultHookTrouble)
    assert [(event.station_id, event.reason) for event in missed] == [("A", "full")]
    assert missed[0].batch_id == setting.opened[1].batch_id


# ------------------------------------------------------------------------------------------------------------- bounds


async def test_polling_goes_on_up_to_the_parked_bytes_and_no_further(
    autojump_clock: MockClock,
) -> None:
    size = len(message_bytes("A", timestamp=EIGHT))
    setting = Setting(max_poll_messages=1)
    for minute in range(40):
        setting.put("A", at=f"2024-01-01T08:{minute:02}:00Z")
    async with setting.open(max_in_flight=1, queue_capacity=1, max_parked_bytes=5 * size) as pipe:
        await wait_all_tasks_blocked()
        statistics = pipe.statistics()
        assert statistics.parked_bytes == 5 * size
        assert statistics.in_flight == 1
        pipe.drain(grace_s=0)
    assert setting.source.committed == {}


async def test_what_joins_takes_bytes_and_waits_for_them(autojump_clock: MockClock) -> None:
    size = len(message_bytes("A", timestamp=EIGHT))
    setting = Setting()
    async with setting.open(max_in_flight_bytes=2 * size, deadline_s=4.0) as pipeline:
        setting.put("A", at=EIGHT)
        await trio.sleep(1)
        setting.put("A", at=NINE)
        await trio.sleep(1)
        setting.put("B", at=NINE)
        await trio.sleep(1)
        statistics = pipeline.statistics()
        assert (statistics.in_flight_bytes, statistics.parked_bytes) == (2 * size, size)
        assert statistics.joined == 0
        await trio.sleep(1.5)  # 08:00 is closed
        statistics = pipeline.statistics()
        assert (statistics.in_flight_bytes, statistics.parked_bytes) == (2 * size, 0)
        assert statistics.joined == 1
        await trio.sleep(1)
        assert pipeline.statistics().in_flight_bytes == 0
    assert outcomes(setting.reports[1]) == {"A": "succeeded", "B": "succeeded", "C": "missing"}
    assert setting.source.committed == {("air", 0): 3}


async def test_what_waited_for_bytes_until_its_batch_was_closed_follows_it(
    autojump_clock: MockClock,
) -> None:
    size = len(message_bytes("A", timestamp=EIGHT))
    setting = Setting()
    async with setting.open(max_in_flight_bytes=size, deadline_s=4.0):
        setting.put("A")
        await trio.sleep(1)
        setting.put("B")
        setting.put("C")
        await trio.sleep(5)
    first, second = setting.reports
    assert outcomes(first) == {"A": "succeeded", "B": "missing", "C": "missing"}
    assert outcomes(second) == {"B": "succeeded", "C": "succeeded"}
    assert second.batch.follow_up
    assert setting.source.committed == {("air", 0): 3}


@pytest.mark.parametrize("seed", range(8))
async def test_whatever_the_order_each_record_is_in_one_report_and_accounted_for(
    seed: int, autojump_clock: MockClock
) -> None:
    dice = random.Random(seed)

    async def handle(station: StationInput) -> Mapping[str, Any]:
        await trio.sleep(dice.choice([0, 0.1, 1, 9]))
        return {}

    setting = Setting(max_poll_messages=dice.choice([1, 3, 50]))
    put = 0
    async with setting.open(
        handle,
        max_in_flight=(slots := dice.choice([1, 2, 8])),
        queue_capacity=8,
        max_in_flight_bytes=dice.choice([100, 400, 10**6]),
        max_parked_bytes=dice.choice([1, 500, 10**6]),
        quorum=dice.choice([0.5, 1.0]),
        deadline_s=2.0,
    ) as pipeline:
        for _ in range(120):
            at = f"2024-01-01T08:{dice.randrange(6):02}:00Z"
            stations = dice.sample([*ROSTER, "X"], dice.randrange(4))
            partition = dice.randrange(3)
            if dice.random() < 0.05:
                setting.source.put("air", partition, b"poison")
            else:
                setting.put(*stations, at=at, partition=partition)
            put += 1
            if dice.random() < 0.3:
                await trio.sleep(dice.choice([0, 0.3, 3]))
                assert pipeline.statistics().in_flight <= slots
        setting.source.end()
        await pipeline.wait_finished()
    batches = [report.batch for report in setting.reports]
    batches += [event.batch for event in setting.observer.of(EmptyBatch)]
    covered = [
        (r.partition, offset)
        for batch in batches
        for r in batch.ranges
        for offset in range(r.first, r.last + 1)
    ]
    assert len(covered) == len(set(covered))
    assert len(covered) + len(setting.observer.of(MessageRefused)) == put
    assert sum(setting.source.committed.values()) == put
    assert len(setting.reports) == len(setting.opened)
    assert len(setting.observer.of(BatchJoined)) == pipeline.statistics().joined
