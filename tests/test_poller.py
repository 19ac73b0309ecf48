"""The poller: drafts and their ids, and when a draft may be opened."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs
import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from stationmaster.abc import NullObserver
from stationmaster.batch import Message, OffsetRange
from stationmaster.events import MessageRefused
from stationmaster.letters import Letters
from stationmaster.messages import Limits
from stationmaster.poller import Boundary, Draft, Intake, Poller, draft_batch
from stationmaster.testing import MemorySource, RecordingObserver
from tests.telemetry import message, message_bytes, one

if TYPE_CHECKING:
    from collections.abc import Callable

    from stationmaster.abc import Observer, Source, Withdrawn
    from stationmaster.batch import Record

# -------------------------------------------------------------------------------------------------------------- drafts


def by_message(*stations: Any, **place: Any) -> Draft:
    return draft_batch([message(*stations, **place)], by="message", group_id="group")


def by_poll(*messages: Message, group_id: str = "group") -> Draft:
    return draft_batch(messages, by="poll", group_id=group_id)


def test_the_id_of_a_message_names_its_record_and_is_the_same_after_a_redelivery() -> None:
    place = {"topic": "wind", "partition": 2, "offset": 12345, "timestamp_ms": 1_999}
    assert by_message("A", **place, generation=1).batch_id == "wind_2_12345_1"
    assert by_message("A", **place, generation=9).batch_id == "wind_2_12345_1"


def test_the_seconds_in_an_id_are_rounded_down_even_before_the_epoch() -> None:
    assert by_message("A", timestamp_ms=-1).batch_id == "air_0_0_-1"


def test_the_id_of_a_poll_depends_on_the_group_the_ranges_and_when_each_begins() -> None:
    same = [
        by_poll(message("A", offset=3), message("B", offset=5)),
        by_poll(message("C", offset=3), message("D", offset=5, timestamp_ms=9, generation=0)),
        by_poll(message("A", offset=3, generation=4), message("B", offset=5, generation=4)),
    ]
    others = [
        by_poll(message("A", offset=3), message("B", offset=5), group_id="another"),
        by_poll(message("A", offset=3), message("B", offset=6)),
        by_poll(message("A", offset=2), message("B", offset=5)),
        by_poll(message("A", offset=3, partition=1), message("B", offset=5, partition=1)),
        by_poll(message("A", offset=3, topic="wind"), message("B", offset=5, topic="wind")),
        by_poll(message("A", offset=3, timestamp_ms=9), message("B", offset=5)),
    ]
    assert len({draft.batch_id for draft in same}) == 1
    assert len({draft.batch_id for draft in [*same, *others]}) == 7
    topic, digest = same[0].batch_id.split("_")
    assert topic == "air"
    assert len(digest) == 16
    assert int(digest, 16)


def test_the_ranges_of_a_poll_stand_for_partition_and_generation_in_order() -> None:
    draft = by_poll(
        message("A", partition=1, offset=7),
        message("A", partition=0, offset=3, generation=1),
        message("A", partition=1, offset=9),
        message("A", partition=0, offset=4, generation=2),
    )
    assert draft.ranges == (
        OffsetRange(topic="air", partition=0, first=3, last=3, generation=1),
        OffsetRange(topic="air", partition=0, first=4, last=4, generation=2),
        OffsetRange(topic="air", partition=1, first=7, last=9, generation=0),
    )


def test_a_range_ends_before_a_refused_record_and_gaps_do_not_end_it() -> None:
    messages = [message("A", offset=offset) for offset in (0, 1, 5, 7, 9)]
    messages.insert(2, message("A", partition=1, offset=5))
    draft = draft_batch(messages, by="poll", group_id="", after_refused={("air", 0, 5)})
    assert [(r.partition, r.first, r.last) for r in draft.ranges] == [
        (0, 0, 1),
        (0, 5, 9),
        (1, 5, 5),
    ]


def test_the_readings_of_a_station_come_together_in_order_with_its_last_message() -> None:
    first = message(
        {"stationId": "B", "x": 1}, {"stationId": "A", "x": 2}, {"stationId": "B", "x": 3}
    )
    second = message({"stationId": "C"}, {"stationId": "A", "x": 4}, 7, offset=1)
    draft = by_poll(first, second)
    assert list(draft.entries) == ["B", "A", "C"]
    assert draft.entries == {"B": ({"x": 1}, {"x": 3}), "A": ({"x": 2}, {"x": 4}), "C": ({},)}
    assert draft.last_message == {"B": first, "A": second, "C": second}
    assert [bad.reason for bad in draft.bad_entries] == ["not-an-object"]
    assert draft.size_bytes == first.size_bytes + second.size_bytes


# -------------------------------------------------------------------------------------------------------------- intake


def test_a_slot_and_the_bytes_must_be_free() -> None:
    intake = Intake(slots=2, max_bytes=100)
    intake.enter(60)
    assert intake.has_room(40)
    assert not intake.has_room(41)
    intake.enter(40)
    assert not intake.has_room(0)
    intake.leave(60)
    assert intake.has_room(60)


def test_a_batch_beyond_the_bytes_is_taken_when_nothing_else_is_open() -> None:
    intake = Intake(slots=2, max_bytes=100)
    assert intake.has_room(10**9)
    intake.enter(10**9)
    assert not intake.has_room(0)
    intake.leave(10**9)
    assert (intake.in_flight, intake.in_flight_bytes) == (0, 0)


async def test_idle_is_when_the_last_batch_has_left() -> None:
    intake = Intake(slots=2, max_bytes=100)
    with trio.fail_after(1):
        await intake.wait_idle()
    intake.enter(1)
    intake.enter(1)
    idle = False

    async def wait() -> None:
        nonlocal idle
        await intake.wait_idle()
        idle = True

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        intake.leave(1)
        await wait_all_tasks_blocked()
        assert not idle
        intake.leave(1)
    assert idle


# ---------------------------------------------------------------------------------------------------------- the poller


@attrs.define
class Opened:
    """Stands where the pipeline would open batches."""

    intake: Intake
    drafts: list[Draft] = attrs.field(factory=list)

    async def open(self, draft: Draft) -> None:
        self.drafts.append(draft)
        self.intake.enter(draft.size_bytes)
        await trio.lowlevel.checkpoint()

    @property
    def ids(self) -> list[str]:
        return [draft.batch_id for draft in self.drafts]


def poller(
    source: Source,
    opened: Opened,
    *,
    by: Boundary = "message",
    may_open: Callable[[Draft], bool] = lambda draft: True,
    observer: Observer | None = None,
) -> Poller:
    return Poller(
        source,
        opened.intake,
        by=by,
        group_id="group",
        limits=Limits(),
        may_open=may_open,
        open_batch=opened.open,
        refuse=Letters(None, account=source.account, observer=observer or NullObserver()).refuse,
    )


def source_of(*values: bytes | None, **settings: Any) -> MemorySource:
    source = MemorySource(**settings)
    for value in values:
        source.put("air", 0, value)
    source.end()
    return source


async def test_one_batch_per_message_to_the_end_of_the_source() -> None:
    opened = Opened(Intake(slots=100, max_bytes=10**6))
    source = source_of(*(message_bytes("A", "B") for _ in range(5)), max_poll_messages=2)
    await poller(source, opened).run()
    assert opened.ids == [f"air_0_{offset}_0" for offset in range(5)]


async def test_one_batch_per_poll_and_topic() -> None:
    opened = Opened(Intake(slots=100, max_bytes=10**6))
    source = MemorySource()
    for topic, partition in (("air", 0), ("wind", 0), ("air", 1)):
        for _ in range(20):
            source.put(topic, partition, message_bytes("A"))
    source.end()
    await poller(source, opened, by="poll").run()
    assert [(draft.topic, len(draft.entries["A"])) for draft in opened.drafts] == [
        ("air", 40),
        ("wind", 20),
    ]
    assert [(r.partition, r.first, r.last) for r in opened.drafts[0].ranges] == [
        (0, 0, 19),
        (1, 0, 19),
    ]


@pytest.mark.parametrize("by", ["message", "poll"])
async def test_a_refused_record_between_good_ones_is_accounted_for_and_told(by: Boundary) -> None:
    observer = RecordingObserver()
    opened = Opened(Intake(slots=100, max_bytes=10**6))
    source = source_of(message_bytes("A"), b"poison", message_bytes("B"), None)
    await poller(source, opened, by=by, observer=observer).run()
    refused = observer.of(MessageRefused)
    assert [(event.record.offset, event.reason) for event in refused] == [
        (1, "not-json"),
        (3, "empty-value"),
    ]
    assert source.committed == {}  # offset 0 is not accounted for yet
    for draft in opened.drafts:
        for offsets in draft.ranges:
            source.account(offsets)
    assert source.committed == {("air", 0): 4}


async def test_a_poll_of_nothing_but_refused_records_opens_nothing() -> None:
    opened = Opened(Intake(slots=100, max_bytes=10**6))
    source = source_of(b"", b"7", None)
    await poller(source, opened, by="poll").run()
    assert opened.drafts == []
    assert source.committed == {("air", 0): 3}


@attrs.define
class Counting:
    """A source that notes how many records each poll returned."""

    source: MemorySource
    polls: list[int] = attrs.field(factory=list)

    async def poll(self) -> list[Record]:
        records = await self.source.poll()
        self.polls.append(len(records))
        return records

    def account(self, offsets: OffsetRange, /) -> None:
        self.source.account(offsets)

    def watch_withdrawals(self, on_withdrawn: Callable[[Withdrawn], None], /) -> None:
        self.source.watch_withdrawals(on_withdrawn)


async def test_a_message_waits_for_a_slot_and_there_is_no_next_poll_meanwhile() -> None:
    intake = Intake(slots=2, max_bytes=10**6)
    opened = Opened(intake)
    source = MemorySource(max_poll_messages=3)
    counting = Counting(source)
    for _ in range(6):
        source.put("air", 0, message_bytes("A"))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(poller(counting, opened).run)
        await wait_all_tasks_blocked()
        assert (len(opened.drafts), counting.polls) == (2, [3])
        intake.leave(opened.drafts[0].size_bytes)
        await wait_all_tasks_blocked()
        assert (len(opened.drafts), counting.polls) == (3, [3, 3])
        intake.leave(opened.drafts[0].size_bytes)
        await wait_all_tasks_blocked()
        assert (len(opened.drafts), counting.polls) == (4, [3, 3])
        nursery.cancel_scope.cancel()


async def test_a_message_waits_for_bytes_but_a_huge_one_goes_alone() -> None:
    small, huge = message_bytes("A"), message_bytes("A", note="x" * 1_000)
    intake = Intake(slots=10, max_bytes=2 * len(small))
    opened = Opened(intake)
    source = source_of(small, small, huge, small)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(poller(source, opened).run)
        await wait_all_tasks_blocked()
        assert len(opened.drafts) == 2
        intake.leave(len(small))
        await wait_all_tasks_blocked()
        assert len(opened.drafts) == 2
        intake.leave(len(small))
        await wait_all_tasks_blocked()
        assert len(opened.drafts) == 3
        intake.leave(len(huge))
    assert len(opened.drafts) == 4


async def test_a_message_waits_until_the_stations_can_take_it_and_looks_again_when_nudged() -> None:
    intake = Intake(slots=10, max_bytes=10**6)
    opened = Opened(intake)
    may_open = False
    asked: list[str] = []

    def ask(draft: Draft) -> bool:
        asked.append(draft.batch_id)
        return may_open

    source = source_of(*[message_bytes("A")] * 2)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(poller(source, opened, may_open=ask).run)
        await wait_all_tasks_blocked()
        assert len(opened.drafts) == 1  # nothing else was open: nobody is asked
        assert asked == ["air_0_1_0"]
        intake.nudge()
        await wait_all_tasks_blocked()
        assert asked == ["air_0_1_0"] * 2
        may_open = True
        intake.nudge()
    assert len(opened.drafts) == 2


async def test_a_cancelled_poller_has_accounted_for_nothing_that_it_did_not_open() -> None:
    intake = Intake(slots=1, max_bytes=10**6)
    opened = Opened(intake)
    source = source_of(message_bytes("A"), message_bytes("A"), b"poison")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(poller(source, opened).run)
        await wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert opened.ids == ["air_0_0_0"]
    source.account(one(0, generation=1))
    assert source.committed == {("air", 0): 1}
    source.lose([("air", 0)])
    source.assign([("air", 0)])
    again = Opened(Intake(slots=9, max_bytes=10**6))
    await poller(source, again).run()
    assert again.ids == ["air_0_1_0"]


async def test_an_error_of_the_source_comes_out_as_it_is() -> None:
    source = MemorySource()
    source.put("air", 0, message_bytes("A"))
    source.fail(OSError("the disk is gone"))
    opened = Opened(Intake(slots=9, max_bytes=10**6))
    with pytest.raises(OSError, match="the disk is gone"):
        await poller(source, opened).run()
    assert opened.ids == ["air_0_0_0"]
