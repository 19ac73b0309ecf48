"""The way of dead letters: bounded, in groups, kept before their offsets count, and never dropped."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import attrs
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from stationmaster.batch import DeadLetter, OffsetRange, Record, Refusal
from stationmaster.errors import StoreError
from stationmaster.events import DeadLettersKept, MessageRefused, StoreBlocked, StoreUnblocked
from stationmaster.letters import Letters
from stationmaster.testing import RecordingObserver
from tests.pipelines import Setting, one_second
from tests.telemetry import message_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

FULL = StoreError("no room for another letter", kind="full")


@attrs.define(eq=False)
class Shelf:
    """A store that says when it is asked, and takes nothing until `opens`."""

    opens: float = -math.inf
    lasts_s: float = 0.0
    asked: list[float] = attrs.field(factory=list)
    kept: list[DeadLetter] = attrs.field(factory=list)
    groups: list[int] = attrs.field(factory=list)

    async def keep(self, letters: Sequence[DeadLetter], /) -> None:
        self.asked.append(trio.current_time())
        await trio.sleep(self.lasts_s)
        if trio.current_time() < self.opens:
            raise FULL
        self.kept += letters
        self.groups.append(len(letters))


@attrs.define(eq=False)
class Office:
    """Letters with what is around them."""

    store: Shelf | None
    observer: RecordingObserver = attrs.field(factory=RecordingObserver)
    accounted: list[OffsetRange] = attrs.field(factory=list)
    letters: Letters = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.letters = Letters(self.store, account=self.accounted.append, observer=self.observer)

    async def refuse(self, count: int) -> None:
        for offset in range(count):
            record = Record(
                topic="air",
                partition=3,
                offset=offset,
                timestamp_ms=5,
                value=b"\xff",
                generation=2,
                headers=(("trace", b"\x00"),),
            )
            await self.letters.refuse(record, Refusal(reason="not-utf8", detail="byte 0"))
        self.letters.close()


async def test_a_refused_record_counts_when_the_store_has_all_of_it_and_not_before(
    autojump_clock: MockClock,
) -> None:
    office = Office(Shelf(lasts_s=1))
    await office.refuse(1)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(office.letters.run)
        await trio.sleep(0.5)
        assert office.accounted == []
    assert office.accounted == [
        OffsetRange(topic="air", partition=3, first=0, last=0, generation=2)
    ]
    assert office.store is not None
    assert office.store.kept == [
        DeadLetter(
            reason="not-utf8",
            detail="byte 0",
            topic="air",
            partition=3,
            offset=0,
            timestamp_ms=5,
            headers=(("trace", b"\x00"),),
            value=b"\xff",
        )
    ]
    assert [event.reason for event in office.observer.of(MessageRefused)] == ["not-utf8"]
    assert office.observer.of(DeadLettersKept) == [DeadLettersKept(letters=(office.store.kept[0],))]


async def test_without_a_store_a_refused_record_is_told_and_counts_at_once() -> None:
    office = Office(None)
    await office.refuse(100)
    await office.letters.keep([])
    assert len(office.accounted) == len(office.observer.of(MessageRefused)) == 100


async def test_a_flood_is_kept_in_few_writes_and_the_poller_waits_for_them(
    autojump_clock: MockClock,
) -> None:
    office = Office(Shelf(lasts_s=1))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(office.refuse, 10_000)
        await wait_all_tasks_blocked()
        assert len(office.observer.of(MessageRefused)) < 100
        nursery.start_soon(office.letters.run)
    assert office.store is not None
    assert [letter.offset for letter in office.store.kept] == list(range(10_000))
    assert len(office.store.groups) <= 10_000 / 16
    assert max(office.store.groups) <= 64


async def test_a_store_that_takes_nothing_is_asked_again_ever_more_slowly_until_it_does(
    autojump_clock: MockClock,
) -> None:
    office = Office(Shelf(opens=60.0))
    await office.refuse(2)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(office.letters.run)
        await trio.sleep(59)
        assert office.accounted == []
        assert office.observer.of(StoreBlocked)
        assert not office.observer.of(StoreUnblocked)
    assert office.store is not None
    pauses = [b - a for a, b in zip(office.store.asked, office.store.asked[1:], strict=False)]
    assert pauses[:6] == [0.25, 0.5, 1, 2, 4, 5]
    assert set(pauses[5:]) == {5}
    assert [letter.offset for letter in office.store.kept] == [0, 1]
    assert len(office.accounted) == 2
    assert not office.letters.is_blocked
    assert office.observer.of(StoreBlocked) == [
        StoreBlocked(store="dead-letters", kind="full", detail=str(FULL))
    ]
    (unblocked,) = office.observer.of(StoreUnblocked)
    assert unblocked == StoreUnblocked(store="dead-letters", blocked_s=office.store.asked[-1])


async def test_what_is_not_kept_when_the_grace_ends_does_not_count(
    autojump_clock: MockClock,
) -> None:
    setting = Setting(1)
    setting.source.put("air", 0, b"poison")
    store = Shelf(opens=math.inf)
    async with setting.open(one_second, dead_letters=store) as pipeline:
        await trio.sleep(2)
        assert setting.committed == 1
        assert pipeline.statistics().blocked == ("dead-letters",)
        pipeline.drain(grace_s=3)
        await pipeline.wait_finished()
    assert trio.current_time() == 5
    assert setting.committed == 1
    assert store.kept == []


async def test_letters_that_wait_when_polling_stops_are_kept_within_the_grace(
    autojump_clock: MockClock,
) -> None:
    setting = Setting(0)
    for _ in range(20):
        setting.source.put("air", 0, b"poison")
    store = Shelf(lasts_s=1)
    async with setting.open(one_second, dead_letters=store) as pipeline:
        await trio.sleep(0.5)
        pipeline.drain(grace_s=10)
        await pipeline.wait_finished()
    assert setting.committed == len(store.kept) == 20


async def test_a_batch_of_a_poll_does_not_count_for_the_refused_record_between_its_messages(
    autojump_clock: MockClock,
) -> None:
    setting = Setting(0)
    for value in (message_bytes("A"), b"poison", message_bytes("B"), b"poison"):
        setting.source.put("air", 0, value)
    store = Shelf(opens=10.0)
    async with setting.open(one_second, dead_letters=store, by="poll") as pipeline:
        await trio.sleep(5)
        (report,) = setting.sink.reports.values()
        assert [(r.first, r.last) for r in report.batch.ranges] == [(0, 0), (2, 2)]
        assert setting.committed == 1, "no further than the letter that is not durable yet"
        setting.source.end()
        await pipeline.wait_finished()
    assert len(store.kept) == 2
    assert setting.committed == 4


async def test_a_letter_that_waits_at_the_end_of_the_source_keeps_the_pipeline_from_ending(
    autojump_clock: MockClock,
) -> None:
    setting = Setting(1)
    setting.source.put("air", 0, b"poison")
    setting.source.end()
    async with setting.open(one_second, dead_letters=Shelf(opens=3600.0)) as pipeline:
        await pipeline.wait_ending()
        assert trio.current_time() >= 3600
        assert setting.committed == 2
        await pipeline.wait_finished()


async def test_a_blocked_store_of_letters_holds_up_no_batch_that_is_open(
    autojump_clock: MockClock,
) -> None:
    setting = Setting(3)
    setting.source.put("air", 1, b"poison")
    async with setting.open(one_second, dead_letters=Shelf(opens=math.inf)):
        await trio.sleep(2)
        assert len(setting.sink.reports) == 3
        setting.source.put("air", 0, b'{"stationData": [{"stationId": "Z"}]}')
        await trio.sleep(2)
        assert len(setting.sink.reports) == 4


async def test_a_store_of_letters_that_is_blocked_for_long_lets_nothing_further_be_polled(
    autojump_clock: MockClock,
) -> None:
    """None of their offsets could be committed: what waits for that would grow without end."""
    setting = Setting(0)
    setting.source.put("air", 1, b"poison")
    async with setting.open(one_second, dead_letters=Shelf(opens=1000.0)):
        for _ in range(100):
            setting.source.put("air", 0, message_bytes("A"))
            await trio.sleep(1)
        assert 10 <= len(setting.sink.reports) <= 12
        await trio.sleep_until(1000 + 5)  # the longest pause between two questions
        assert len(setting.sink.reports) > 12
        await trio.sleep(100)  # one station, one second each
        assert len(setting.sink.reports) == 100
        assert setting.committed == 100
