"""What waits for room, with batches that are cut by timestamp: who is opened before whom, and who joins what."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs
import trio

from stationmaster.batch import OffsetRange
from stationmaster.drafts import draft_batch
from stationmaster.events import BatchJoined
from stationmaster.parked import Parked
from stationmaster.settings import TopicSettings
from stationmaster.testing.sink import Slow
from tests.telemetry import message, message_bytes, record
from tests.test_pipeline_timestamps import EIGHT, NINE, TEN, Setting

if TYPE_CHECKING:
    from trio.testing import MockClock

    from stationmaster.batch import StationInput

URGENT = {"alarm": TopicSettings(priority="high", roster=("A", "B"))}


async def test_what_is_urgent_is_opened_before_what_is_older(autojump_clock: MockClock) -> None:
    setting = Setting()
    setting.put("A", at=EIGHT)  # takes the only slot
    async with setting.open(max_in_flight=1, queue_capacity=1, deadline_s=1.0, topics=URGENT):
        await trio.sleep(0.5)
        setting.put("A", at=NINE)
        setting.put("A", at=TEN, topic="alarm")
        await trio.sleep(10)
    assert [(batch.topic, batch.last_message["A"].timestamp.hour) for batch in setting.opened] == [
        ("air", 8),
        ("alarm", 10),
        ("air", 9),
    ]


async def test_what_is_urgent_stays_so_when_the_batch_that_it_was_to_join_is_closed(
    autojump_clock: MockClock,
) -> None:
    size = len(message_bytes("A", timestamp=EIGHT))
    setting = Setting()
    async with setting.open(
        max_in_flight=1, queue_capacity=1, max_in_flight_bytes=size, deadline_s=1.0, topics=URGENT
    ):
        setting.put("A", at=TEN, topic="alarm")
        await trio.sleep(0.5)
        setting.put("A", at=EIGHT)
        setting.put("B", at=TEN, topic="alarm")  # there are no bytes for it
        await trio.sleep(10)
    assert [(batch.topic, list(batch.entries)) for batch in setting.opened] == [
        ("alarm", ["A"]),
        ("alarm", ["B"]),
        ("air", ["A"]),
    ]


async def test_what_waits_counts_with_all_that_joined_it(autojump_clock: MockClock) -> None:
    size = len(message_bytes("A", timestamp=EIGHT))
    setting = Setting(max_poll_messages=1)
    setting.put("A", at=EIGHT)
    async with setting.open(max_in_flight=1, queue_capacity=1) as pipeline:
        for station in ("A", "B", "C"):
            setting.put(station, at=NINE)
        await trio.sleep(1)
        assert pipeline.statistics().parked_bytes == 3 * size
        await trio.sleep(10)
        assert pipeline.statistics().parked_bytes == 0
        joined = setting.observer.of(BatchJoined)
    assert not joined  # they were one draft


async def test_who_joins_an_open_batch_is_told_with_its_offsets(autojump_clock: MockClock) -> None:
    setting = Setting(max_poll_messages=1)
    setting.put("A", at=EIGHT)
    setting.put("A", "B", at=NINE, partition=1)
    setting.put("B", at=EIGHT)
    await setting.run()
    [joined] = setting.observer.of(BatchJoined)
    first = setting.opened[0]
    assert joined == BatchJoined(
        batch_id=first.batch_id,
        ranges=(OffsetRange(topic="air", partition=0, first=1, last=1, generation=1),),
        stations=1,
    )


def test_the_bytes_that_wait_are_those_of_records_as_polled_and_of_drafts_as_parsed() -> None:
    parked, each = Parked(), 256
    first, second, urgent = (record(b"x" * size, offset=size) for size in (10, 20, 400))
    for item in (first, second):
        parked.add(item, urgent=False)
    parked.add(urgent, urgent=True)
    assert parked.size_bytes == 430 + 3 * each
    assert list(parked.records()) == [(urgent, True), (first, False)]
    parked.parsed(None, urgent=True)  # it was refused
    assert parked.size_bytes == 30 + 2 * each
    draft = draft_batch([message("A")], by="message", group_id="")
    parked.parsed(draft, urgent=False)
    assert parked.size_bytes == draft.size_bytes + 20 + each
    assert list(parked.heads()) == [draft]
    parked.take(draft)
    assert parked.size_bytes == 20 + each
    assert list(parked.records()) == [(second, False)]
    parked.parsed(None, urgent=False)
    assert (parked.size_bytes, bool(parked)) == (0, False)


def test_what_has_no_value_counts_with_its_headers_and_something_besides() -> None:
    parked = Parked()
    parked.add(record(None, offset=0), urgent=False)
    assert parked.size_bytes == 256
    with_headers = attrs.evolve(record(None, offset=1), headers=(("name", b"x" * 1000), ("", None)))
    parked.add(with_headers, urgent=False)
    assert parked.size_bytes == 256 + (256 + 256 + 4 + 1000 + 256)


def test_records_of_a_partition_that_leaves_are_removed_but_not_the_next_one() -> None:
    parked = Parked()
    draft = draft_batch([message("A")], by="message", group_id="")
    parked.add(draft, urgent=True)
    for offset in range(3):
        parked.add(record(b"x", partition=1, offset=offset), urgent=False)
        parked.add(record(b"yy", partition=2, offset=offset), urgent=False)
    gone = parked.remove({("air", 1, 0), ("air", 0, 0)})
    assert [(each.partition, each.offset) for each in gone] == [(1, 1), (1, 2)]
    assert [each.partition for each, _ in parked.records()] == [1]
    assert next(parked.heads()) is draft
    assert parked.size_bytes == draft.size_bytes + 4 * 256 + 1 + 6


def test_of_one_time_the_first_that_came_is_the_first_to_be_opened() -> None:
    parked = Parked()
    drafts = [
        draft_batch([message("A", topic=topic)], by="timestamp", group_id="")
        for topic in ("wind", "air", "sun")
    ]
    for draft in drafts:
        parked.add_timed(draft, urgent=False, joins=False)
    opened = []
    while parked:
        draft = next(parked.heads())
        parked.take(draft)
        opened.append(draft)
    assert opened == drafts


async def test_a_station_is_called_once_although_others_join_its_batch(
    autojump_clock: MockClock,
) -> None:
    called: list[str] = []

    async def handle(station: StationInput) -> None:
        called.append(station.station_id)
        await trio.sleep(0.25)

    setting = Setting()
    async with setting.open(handle):
        for station in ("A", "B", "C"):
            setting.put(station)
            await trio.sleep(0.5)
        await trio.sleep(1)
    assert called == ["A", "B", "C"]
    assert len(setting.reports) == 1


async def test_an_urgent_batch_of_a_poll_overtakes_one_of_an_earlier_poll(
    autojump_clock: MockClock,
) -> None:
    setting = Setting()
    # Where one topic is cut by timestamp, polling goes on while others wait.
    topics = URGENT | {"wind": TopicSettings(by="timestamp")}
    async with setting.open(
        by="poll", max_in_flight=1, queue_capacity=1, upload_timeout_s=9.0, topics=topics
    ):
        setting.sink.script.append(Slow(2.0))
        for station, topic in (("A", "air"), ("B", "air"), ("C", "alarm")):
            setting.put(station, topic=topic)
            await trio.sleep(0.5)
        await trio.sleep(5)
    assert [list(batch.entries) for batch in setting.opened] == [["A"], ["C"], ["B"]]
