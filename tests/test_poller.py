"""The poller: drafts and their ids, and when a draft may be opened."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs
import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from stationmaster.abc import NullObserver
from stationmaster.drafts import Draft
from stationmaster.events import MessageRefused
from stationmaster.intake import Intake
from stationmaster.letters import Letters
from stationmaster.poller import Poller
from stationmaster.settings import PipelineSettings, TopicSettings
from stationmaster.testing import MemorySource, RecordingObserver
from tests.telemetry import message_bytes, one

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from stationmaster.abc import Observer, Source, Withdrawn
    from stationmaster.batch import Message, OffsetRange, Record
    from stationmaster.settings import Boundary

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
    settings: PipelineSettings | None = None,
    may_open: Callable[[Draft], bool] = lambda draft: True,
    observer: Observer | None = None,
) -> Poller:
    letters = Letters(None, account=source.account, observer=observer or NullObserver())
    return Poller(
        source,
        opened.intake,
        settings=settings or PipelineSettings(by=by, group_id="group"),
        may_open=may_open,
        may_join=lambda draft: False,
        open_batch=opened.open,
        refuse=letters.refuse,
        until_pollable=letters.until_pollable,
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


async def test_a_large_poll_is_parsed_and_drafted_in_slices(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    add, slices = Draft.add, []

    def watched(draft: Draft, messages: Sequence[Message]) -> None:
        slices.append(len(messages))
        add(draft, messages)

    monkeypatch.setattr(Draft, "add", watched)
    opened = Opened(Intake(slots=100, max_bytes=10**7))
    entries = [{"stationId": "A", "number": number} for number in range(50)]
    source = source_of(*(message_bytes(entry, note="x" * 20_000) for entry in entries))
    turns = 0

    async def count_turns() -> None:
        nonlocal turns
        while True:
            await trio.lowlevel.checkpoint()
            turns += not opened.drafts

    async with trio.open_nursery() as nursery:
        nursery.start_soon(count_turns)
        await poller(source, opened, by="poll").run()
        nursery.cancel_scope.cancel()
    (draft,) = opened.drafts
    assert [reading["number"] for reading in draft.entries["A"]] == list(range(50))
    assert [(r.first, r.last) for r in draft.ranges] == [(0, 49)]
    assert turns > 20
    assert slices == [2] * 25


@pytest.mark.parametrize("by", ["message", "poll", "timestamp"])
async def test_while_a_large_message_is_parsed_others_have_their_turn(by: Boundary) -> None:
    opened = Opened(Intake(slots=100, max_bytes=10**7))
    source = source_of(message_bytes(*(f"S{number}" for number in range(10_000))))
    turns = 0

    async def count_turns() -> None:
        nonlocal turns
        while True:
            await trio.lowlevel.checkpoint()
            turns += not opened.drafts

    async with trio.open_nursery() as nursery:
        nursery.start_soon(count_turns)
        settings = PipelineSettings(by=by, roster=("S0",))
        await poller(source, opened, settings=settings).run()
        nursery.cancel_scope.cancel()
    assert len(opened.drafts[0].entries) == 10_000
    assert turns >= 20


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

    def watch_withdrawals(
        self,
        on_withdrawn: Callable[[Withdrawn], None],
        /,
        *,
        on_leaving: Callable[[Withdrawn], Sequence[OffsetRange]] | None = None,
    ) -> None:
        self.source.watch_withdrawals(on_withdrawn, on_leaving=on_leaving)


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


async def test_a_message_waits_until_the_stations_can_take_it_and_looks_again_when_they_are_eased() -> (
    None
):
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
        intake.ease()
        await wait_all_tasks_blocked()
        assert asked == ["air_0_1_0"] * 2
        may_open = True
        intake.ease()
    assert len(opened.drafts) == 2


async def test_all_of_a_poll_that_can_be_given_back_waits_before_the_rest_is_parsed() -> None:
    """Else what is given back has something after it that is not, and a drain waits for both."""
    settings = PipelineSettings(topics={"slow": TopicSettings(by="poll")})
    source = MemorySource()
    for topic, partition, field in (("air", 0, ""), ("slow", 0, "x" * 40_000), ("air", 1, "")):
        for _ in range(3):
            source.put(topic, partition, message_bytes("A", field=field))
    polling = poller(source, Opened(Intake(slots=1, max_bytes=10**6)), settings=settings)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(polling.run)
        while not polling.parked_bytes:
            await trio.lowlevel.checkpoint()
        given = polling.give_back([("air", 0, 1), ("air", 1, 1)])
        assert [(each.partition, each.first) for each in given] == [
            (0, 1),
            (0, 2),
            (1, 0),
            (1, 1),
            (1, 2),
        ]
        nursery.cancel_scope.cancel()


async def test_stations_that_are_eased_all_the_time_keep_no_poller_from_polling() -> None:
    """An open batch may lack what only the next polls bring."""

    class Slow(MemorySource):
        async def poll(self) -> list[Record]:  # type: ignore[explicit-override]
            for _ in range(20):
                await trio.lowlevel.checkpoint()
            return await super().poll()

    roster = PipelineSettings(topics={"air": TopicSettings(by="timestamp", roster=("A",))})
    intake = Intake(slots=1, max_bytes=10**6)
    opened = Opened(intake)
    source = Slow(max_poll_messages=1)
    for hour in range(5):
        source.put("air", 0, message_bytes("A", timestamp=f"2026-01-01T0{hour}:00:00Z"))
    source.end()
    polling = poller(source, opened, settings=roster)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(polling.run)
        for _ in range(300):
            intake.ease()
            await trio.lowlevel.checkpoint()
        assert polling.parked_bytes == 4 * opened.drafts[0].size_bytes
        nursery.cancel_scope.cancel()


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
