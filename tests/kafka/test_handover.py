"""The trio side of the pump alone: what happens to polls that wait when partitions leave or begin anew."""

from __future__ import annotations

from queue import SimpleQueue
from typing import TYPE_CHECKING

import attrs
import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from stationmaster.batch import OffsetRange, Record
from stationmaster.kafka.assignment import Assignment, Drain, Holding
from stationmaster.kafka.handover import Command, Handover
from stationmaster.testing import RecordingObserver

if TYPE_CHECKING:
    from stationmaster.abc import Withdrawn


@attrs.define(eq=False)
class Bench:
    """A hand-over with the pump's part played by the test."""

    assignment: Assignment = attrs.field(factory=Assignment)
    commands: SimpleQueue[Command] = attrs.field(factory=SimpleQueue)
    handover: Handover = attrs.field(init=False)
    withdrawn: list[Withdrawn] = attrs.field(factory=list)

    def __attrs_post_init__(self) -> None:
        self.handover = Handover(RecordingObserver(), self.commands)
        self.handover.on_withdrawn = self.withdrawn.append

    def assign(self, partition: int) -> Holding:
        holding = self.assignment.hold(("t", partition))
        self.handover.assigned([holding])
        return holding

    def deliver(self, *places: tuple[int, int, int]) -> None:
        """Deliver one poll of (partition, offset, generation)."""
        self.handover.polled(
            [
                Record(topic="t", partition=p, offset=o, timestamp_ms=0, value=b"", generation=g)
                for p, o, g in places
            ]
        )


def span(partition: int, first: int, last: int, generation: int = 1) -> OffsetRange:
    return OffsetRange(
        topic="t", partition=partition, first=first, last=last, generation=generation
    )


async def test_a_waiting_poll_keeps_what_is_not_revoked_and_an_empty_one_gives_its_credit_back() -> (
    None
):
    bench = Bench()
    leaving, staying = bench.assign(0), bench.assign(1)
    bench.deliver((0, 5, 1), (1, 7, 1))
    bench.deliver((0, 6, 1))
    drain = Drain([leaving])
    bench.handover.revoking(drain)
    assert drain.done.is_set()  # nothing of it was handed out
    assert bench.commands.get_nowait() is Command.MORE
    assert bench.commands.empty()
    bench.handover.left([leaving])
    records = await bench.handover.poll()
    assert [(r.partition, r.offset) for r in records] == [(1, 7)]
    assert (leaving.lease.outstanding, staying.lease.outstanding) == (0, 1)


async def test_a_drain_is_done_with_the_last_accounting_of_all_its_partitions() -> None:
    bench = Bench()
    drain = Drain([bench.assign(0), bench.assign(1)])
    bench.deliver((0, 5, 1), (1, 7, 1), (1, 8, 1))
    await bench.handover.poll()
    bench.handover.revoking(drain)
    bench.handover.account(span(0, 5, 5))
    bench.handover.account(span(1, 8, 8))
    assert not drain.done.is_set()
    bench.handover.account(span(1, 7, 7))
    assert drain.done.is_set()


async def test_what_is_given_back_when_a_drain_begins_is_not_waited_for_and_not_committed() -> None:
    bench = Bench()
    leaving = bench.assign(0)
    bench.deliver((0, 5, 1), (0, 6, 1), (0, 7, 1))
    await bench.handover.poll()
    asked: list[Withdrawn] = []

    def give_back(gone: Withdrawn) -> list[OffsetRange]:
        asked.append(gone)
        return [span(0, 6, 6), span(0, 7, 7)]

    bench.handover.on_leaving = give_back
    drain = Drain([leaving])
    bench.handover.revoking(drain)
    assert asked == [[("t", 0, 1)]]
    assert not drain.done.is_set()
    bench.handover.account(span(0, 5, 5))
    assert drain.done.is_set()
    assert leaving.lease.watermark == 6


async def test_an_error_of_who_gives_back_is_raised_by_the_next_poll_and_the_drain_waits() -> None:
    bench = Bench()
    leaving = bench.assign(0)
    bench.deliver((0, 5, 1))
    await bench.handover.poll()

    def fail(gone: Withdrawn) -> list[OffsetRange]:
        raise ValueError(gone)

    bench.handover.on_leaving = fail
    drain = Drain([leaving])
    bench.handover.revoking(drain)
    assert not drain.done.is_set()
    with pytest.raises(ValueError, match="'t', 0, 1"):
        await bench.handover.poll()


async def test_closing_ends_every_drain_that_is_and_that_comes() -> None:
    bench = Bench()
    one, two = Drain([bench.assign(0)]), Drain([bench.assign(1)])
    bench.deliver((0, 5, 1), (1, 7, 1))
    await bench.handover.poll()
    bench.handover.revoking(one)
    bench.handover.close()
    bench.handover.revoking(two)
    assert one.done.is_set()
    assert two.done.is_set()


async def test_what_was_read_before_its_partition_began_anew_is_withdrawn_and_never_committed() -> (
    None
):
    bench = Bench()
    old = bench.assign(0)
    bench.deliver((0, 5, 1))
    await bench.handover.poll()
    bench.deliver((0, 6, 1))
    new = bench.assign(0)
    assert bench.withdrawn == [[("t", 0, 1)]]
    bench.deliver((0, 1, 2))
    assert [r.offset for r in await bench.handover.poll()] == [1]
    bench.handover.account(span(0, 5, 5, generation=1))
    bench.handover.account(span(0, 1, 1, generation=2))
    assert (old.lease.watermark, new.lease.watermark) == (None, 2)


async def test_after_closing_polls_are_dropped_and_counted_and_a_waiting_reader_is_told() -> None:
    bench = Bench()
    bench.assign(0)

    async def wait() -> None:
        with pytest.raises(trio.ClosedResourceError):
            await bench.handover.poll()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        await wait_all_tasks_blocked()
        bench.handover.close()
    bench.deliver((0, 5, 1))
    assert bench.handover.dropped_polls == 1
    assert bench.commands.get_nowait() is Command.STOP


async def test_withdrawals_are_told_after_the_drain_and_not_once_the_source_is_being_left() -> None:
    bench = Bench()
    first, second = bench.assign(0), bench.assign(1)
    bench.handover.revoking(Drain([first]))
    assert not bench.withdrawn
    bench.handover.left([])
    assert not bench.withdrawn
    bench.handover.left([first])
    assert bench.withdrawn == [[("t", 0, 1)]]
    bench.handover.close()
    bench.handover.left([second])
    assert bench.withdrawn == [[("t", 0, 1)]]


async def test_what_is_of_no_partition_that_is_held_is_outstanding_nowhere() -> None:
    bench = Bench()
    held = bench.assign(0)
    bench.deliver((0, 5, 1), (7, 5, 1), (0, 6, 1))
    assert len(await bench.handover.poll()) == 3
    bench.handover.account(span(7, 5, 5))
    assert held.lease.outstanding == 2


async def test_an_error_of_the_watcher_is_raised_by_the_next_poll() -> None:
    bench = Bench()

    def fail(withdrawn: Withdrawn) -> None:
        raise LookupError(withdrawn)

    bench.handover.on_withdrawn = fail
    bench.handover.left([bench.assign(0)])
    assert not bench.handover.holdings
    with pytest.raises(LookupError, match=r"'t', 0, 1"):
        await bench.handover.poll()


async def test_the_first_of_several_errors_is_the_one_that_is_raised() -> None:
    bench = Bench()
    bench.handover.failed(LookupError("first"))
    bench.handover.failed(LookupError("second"))
    with pytest.raises(LookupError, match="first"):
        bench.handover.raise_what_nobody_saw()
