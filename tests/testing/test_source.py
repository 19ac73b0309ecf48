"""What the source in memory offers beyond the contract: rebalances, failures and offsets that the test drives."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from stationmaster.batch import OffsetRange, Record
from stationmaster.errors import SourceError
from stationmaster.events import (
    OffsetsCommitted,
    PartitionsAssigned,
    PartitionsLost,
    PartitionsRevoked,
)
from stationmaster.testing import RecordingObserver
from stationmaster.testing.source import MemorySource

if TYPE_CHECKING:
    from stationmaster.abc import Withdrawn

ZERO = ("t", 0)


def fill(source: MemorySource, count: int, partition: int = 0) -> None:
    for number in range(count):
        source.put("t", partition, b"%d" % number)


def span(first: Record, last: Record | None = None) -> OffsetRange:
    return OffsetRange(
        topic=first.topic,
        partition=first.partition,
        first=first.offset,
        last=(last or first).offset,
        generation=first.generation,
    )


async def test_partitions_take_turns_when_a_poll_cannot_hold_all() -> None:
    source = MemorySource(max_poll_messages=2)
    fill(source, 4, 0)
    fill(source, 2, 1)
    polls = [await source.poll() for _ in range(3)]
    assert [[r.partition for r in poll] for poll in polls] == [[0, 0], [1, 1], [0, 0]]


async def test_a_log_may_have_gaps_but_no_offset_twice() -> None:
    source = MemorySource()
    assert source.put("t", 0, b"a", offset=7) == 7
    assert source.put("t", 0, b"b") == 8
    assert source.put("t", 0, b"c", offset=20) == 20
    with pytest.raises(ValueError, match="offset 20 is taken; the next is 21"):
        source.put("t", 0, b"d", offset=20)
    first, *_, last = await source.poll()
    source.account(span(first, last))
    assert source.committed == {ZERO: 21}


async def test_every_commit_is_remembered_and_told_in_whole() -> None:
    observer = RecordingObserver()
    source = MemorySource(observer=observer)
    fill(source, 4)
    a, b, c, d = await source.poll()
    source.account(span(b))
    source.account(span(a))
    source.account(span(c, d))
    assert source.commits == {ZERO: [2, 4]}
    told = [event.offsets[0] for event in observer.of(OffsetsCommitted)]
    assert [(each.first, each.last) for each in told] == [(0, 1), (2, 3)]


async def test_a_failure_is_raised_when_what_is_there_was_returned() -> None:
    source = MemorySource()
    fill(source, 1)
    source.fail(SourceError("gone"))
    assert len(await source.poll()) == 1
    for _ in range(2):
        with pytest.raises(SourceError, match="gone"):
            await source.poll()


async def test_a_revoke_waits_until_what_was_handed_out_is_accounted_for() -> None:
    observer = RecordingObserver()
    source = MemorySource(observer=observer)
    fill(source, 3)
    first, *_, last = await source.poll()
    outcome: list[bool] = []

    async def revoke() -> None:
        outcome.append(await source.revoke([ZERO]))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(revoke)
        await wait_all_tasks_blocked()
        assert not outcome
        source.put("t", 0, b"not read any more")
        source.account(span(first, last))
    assert outcome == [True]
    assert source.committed == {ZERO: 3}
    assert observer.of(PartitionsRevoked)[0].drained


async def test_a_revoke_ends_at_its_limit_and_what_comes_later_is_dropped(
    autojump_clock: MockClock,
) -> None:
    observer = RecordingObserver()
    source = MemorySource(observer=observer, drain_timeout_s=5)
    fill(source, 3)
    records = await source.poll()
    assert not await source.revoke([ZERO])
    assert trio.current_time() == 5
    assert (event := observer.of(PartitionsRevoked)[0]).drain_s == 5
    assert not event.drained
    source.account(span(records[0], records[2]))
    assert source.committed == {}


async def test_a_revoke_of_partitions_that_nobody_reads_from_does_not_wait() -> None:
    source = MemorySource(drain_timeout_s=1000)
    fill(source, 3)
    assert await source.revoke([ZERO])


async def test_a_revoke_that_is_cancelled_takes_the_partition_away_all_the_same() -> None:
    source = MemorySource(drain_timeout_s=1000)
    fill(source, 3)
    await source.poll()
    with trio.move_on_after(0):
        await source.revoke([ZERO])
    source.put("t", 0, b"nobody reads this")
    source.end()
    with pytest.raises(trio.EndOfChannel):
        await source.poll()


async def test_after_a_loss_the_records_come_again_from_the_commit_under_a_new_generation() -> None:
    observer = RecordingObserver()
    source = MemorySource(observer=observer)
    fill(source, 4)
    records = await source.poll()
    source.account(span(records[0]))
    source.lose([ZERO])
    source.account(span(records[1]))  # nobody's any more
    source.assign([ZERO])
    source.account(span(records[1], records[3]))  # of an older generation
    again = await source.poll()
    assert [(r.offset, r.generation) for r in again] == [(1, 2), (2, 2), (3, 2)]
    assert source.commits == {ZERO: [1]}
    assert observer.of(PartitionsLost) == [PartitionsLost(partitions=(ZERO,))]
    assert observer.of(PartitionsAssigned) == [PartitionsAssigned(partitions=(ZERO,))] * 2


async def test_every_generation_that_ends_is_withdrawn_from_whoever_watched_last() -> None:
    source = MemorySource(drain_timeout_s=0)
    fill(source, 1, 0)
    fill(source, 1, 1)
    source.lose([("t", 1)])  # nobody watches
    withdrawn: list[Withdrawn] = []
    source.watch_withdrawals(lambda _: pytest.fail("another has taken its place"))
    source.watch_withdrawals(withdrawn.append)
    source.assign([ZERO])  # as if its log had been cut
    await source.revoke([ZERO])
    source.assign([ZERO, ("t", 1)])
    source.lose([ZERO, ("t", 1)])
    assert withdrawn == [[("t", 0, 1)], [("t", 0, 2)], [("t", 0, 3), ("t", 1, 2)]]


async def test_a_partition_can_be_assigned_before_it_has_records() -> None:
    source = MemorySource()
    source.assign([ZERO])
    source.put("t", 0, b"first")
    (record,) = await source.poll()
    assert record.generation == 1
