"""What every source must do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs
import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from stationmaster.batch import OffsetRange, Record
from stationmaster.testing.contracts.running import Contract, in_trio

if TYPE_CHECKING:
    from contextlib import AbstractAsyncContextManager

    from stationmaster.abc import Source, Withdrawn


def _span(first: Record, last: Record | None = None) -> OffsetRange:
    return OffsetRange(
        topic=first.topic,
        partition=first.partition,
        first=first.offset,
        last=(last or first).offset,
        generation=first.generation,
    )


def _numbered(count: int) -> list[bytes]:
    return [b"%d" % number for number in range(count)]


@attrs.define(eq=False)
class _Watcher:
    """Remembers what was withdrawn, and can be waited for."""

    calls: list[set[tuple[str, int, int]]] = attrs.field(factory=list)
    called: trio.Event = attrs.field(factory=trio.Event)

    def __call__(self, withdrawn: Withdrawn) -> None:
        self.calls.append(set(withdrawn))
        assert len(self.calls[-1]) == len(withdrawn)
        self.called.set()


class _Reading(Contract):
    patience_s: float = 60.0
    topic: str = "readings"
    """Where the records lie."""
    at_most: int = 4
    """How many records a poll of this source returns at most."""

    def put(self, *values: bytes | None, partition: int = 0, **more: Any) -> None:  # noqa: ANN401
        """Append records with these values to a partition of `topic`, also while a reader is there.

        Args:
            values: in this order; None is a tombstone.
            partition: from 0 to 3, and 0 for sources without a broker.
            more: for a broker's sources `timestamp_ms` and `headers`, as in `stationmaster.batch.Record`.
        """
        raise NotImplementedError

    def open(self) -> AbstractAsyncContextManager[Source]:
        """Let a reader come; it leaves at the end of the block. Another may follow."""
        raise NotImplementedError

    async def read(self, source: Source, count: int) -> list[Record]:
        """Poll until so many records came, and hold every poll to the contract."""
        await trio.lowlevel.checkpoint()
        records: list[Record] = []
        while len(records) < count:
            polled = await source.poll()
            assert 1 <= len(polled) <= self.at_most
            records += polled
        assert len(records) == count
        return records


class SourceContract(_Reading):
    """What every `stationmaster.abc.Source` must do."""

    def committed(self) -> int:
        """Return the next offset of partition 0 after what is committed, once the reader has left; 0: nothing is."""
        raise NotImplementedError

    @in_trio
    async def test_records_come_in_order_and_each_once(self) -> None:
        self.put(*_numbered(10))
        async with self.open() as source:
            records = await self.read(source, 10)
        assert [record.value for record in records] == _numbered(10)
        assert [record.offset for record in records] == list(range(10))
        assert {(record.topic, record.partition) for record in records} == {(self.topic, 0)}

    @in_trio
    async def test_a_cancelled_poll_raises_and_loses_no_record(self) -> None:
        self.put(*_numbered(6))
        records: list[Record] = []
        async with self.open() as source:
            while len(records) < 6:
                with trio.CancelScope() as scope:
                    scope.cancel()
                    await source.poll()
                assert scope.cancelled_caught
                records += await source.poll()
        assert [record.value for record in records] == _numbered(6)

    @in_trio
    async def test_nothing_is_committed_before_it_is_accounted_for(self) -> None:
        self.put(*_numbered(4))
        async with self.open() as source:
            await self.read(source, 4)
        assert self.committed() == 0

    @in_trio
    async def test_what_is_accounted_for_is_committed_when_the_source_closes(self) -> None:
        self.put(*_numbered(4))
        async with self.open() as source:
            records = await self.read(source, 4)
            source.account(_span(records[0], records[2]))
        assert self.committed() == 3

    @in_trio
    async def test_a_hole_holds_the_commit_back(self) -> None:
        self.put(*_numbered(6))
        async with self.open() as source:
            records = await self.read(source, 6)
            source.account(_span(records[0], records[1]))
            source.account(_span(records[3], records[5]))
        assert self.committed() == 2

    @in_trio
    async def test_the_order_of_accounting_does_not_matter_once_the_hole_is_filled(self) -> None:
        self.put(*_numbered(6))
        async with self.open() as source:
            records = await self.read(source, 6)
            source.account(_span(records[4], records[5]))
            source.account(_span(records[0]))
            source.account(_span(records[1], records[3]))
        assert self.committed() == 6

    @in_trio
    async def test_accounting_for_another_generation_partition_or_topic_changes_nothing(
        self,
    ) -> None:
        self.put(*_numbered(3))
        async with self.open() as source:
            records = await self.read(source, 3)
            whole = _span(records[0], records[2])
            for generation in (whole.generation - 1, whole.generation + 1):
                source.account(attrs.evolve(whole, generation=generation))
            source.account(attrs.evolve(whole, partition=3))
            source.account(attrs.evolve(whole, topic="another"))
        assert self.committed() == 0

    @in_trio
    async def test_accounting_after_the_end_harms_nobody(self) -> None:
        self.put(*_numbered(3))
        async with self.open() as source:
            records = await self.read(source, 3)
        source.account(_span(records[0], records[2]))

    @in_trio
    async def test_a_second_accounting_of_an_old_range_does_not_take_the_commit_back(self) -> None:
        self.put(*_numbered(6))
        async with self.open() as source:
            records = await self.read(source, 6)
            source.account(_span(records[0], records[5]))
            source.account(_span(records[0], records[1]))
        assert self.committed() == 6

    @in_trio
    async def test_nothing_is_withdrawn_while_nobody_takes_anything_away(self) -> None:
        self.put(*_numbered(4))
        watcher = _Watcher()
        async with self.open() as source:
            source.watch_withdrawals(watcher)
            records = await self.read(source, 4)
            source.account(_span(records[0], records[3]))
            assert not watcher.calls


class BoundedSourceContract(_Reading):
    """What a source must do besides that has an end: after the last record that was put."""

    @in_trio
    async def test_at_the_end_every_poll_says_so(self) -> None:
        self.put(b"only")
        async with self.open() as source:
            await self.read(source, 1)
            for _ in range(2):
                with pytest.raises(trio.EndOfChannel):
                    await source.poll()


class BrokerSourceContract(SourceContract):
    """What a source must do besides behind which a broker stands: partitions come and go, and so do readers."""

    def rival(self) -> AbstractAsyncContextManager[None]:
        """Let somebody else join: at least one of four partitions leaves the reader, after its drain."""
        raise NotImplementedError

    @in_trio
    async def test_every_partition_is_read_in_its_own_order(self) -> None:
        for partition in range(4):
            self.put(*_numbered(5), partition=partition)
        async with self.open() as source:
            records = await self.read(source, 20)
        for partition in range(4):
            values = [record.value for record in records if record.partition == partition]
            assert values == _numbered(5)

    @in_trio
    async def test_tombstones_empty_values_headers_and_timestamps_come_as_they_are(self) -> None:
        headers = (("trace", b"\x00\xff"), ("none", None), ("trace", b"again"))
        self.put(None, timestamp_ms=1_700_000_000_123, headers=headers)
        self.put(b"", timestamp_ms=1_700_000_000_124)
        async with self.open() as source:
            tombstone, empty = await self.read(source, 2)
        assert (tombstone.value, empty.value) == (None, b"")
        assert (tombstone.headers, empty.headers) == (headers, ())
        assert tombstone.timestamp_ms == 1_700_000_000_123
        assert empty.timestamp_ms == 1_700_000_000_124

    @in_trio
    async def test_a_poll_that_was_waiting_when_it_was_cancelled_loses_no_record(self) -> None:
        found: list[Record] = []

        async def poll_once(source: Source) -> None:
            found.extend(await source.poll())

        self.put(b"first")
        async with self.open() as source:
            await self.read(source, 1)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(poll_once, source)
                await wait_all_tasks_blocked()
                self.put(b"second")
                nursery.cancel_scope.cancel()
            if not found:  # the poll may have won
                found = await self.read(source, 1)
        assert [record.value for record in found] == [b"second"]

    @in_trio
    async def test_a_waiting_poll_wakes_up_for_a_new_record(self) -> None:
        self.put(b"first")
        found: list[Record] = []

        async def wait_for_one(source: Source) -> None:
            found.extend(await self.read(source, 1))

        async with self.open() as source:
            await self.read(source, 1)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(wait_for_one, source)
                await wait_all_tasks_blocked()
                self.put(b"second")
        assert [record.value for record in found] == [b"second"]

    @in_trio
    async def test_the_next_reader_begins_at_the_first_record_that_was_not_accounted_for(
        self,
    ) -> None:
        self.put(*_numbered(6))
        async with self.open() as source:
            records = await self.read(source, 6)
            source.account(_span(records[0], records[1]))
            source.account(_span(records[3]))
        async with self.open() as source:
            again = await self.read(source, 4)
            assert [record.offset for record in again] == [2, 3, 4, 5]
            source.account(_span(again[0], again[3]))
        assert self.committed() == 6

    @in_trio
    async def test_what_a_rebalance_takes_away_is_withdrawn_once_and_only_after_its_drain(
        self,
    ) -> None:
        for partition in range(4):
            self.put(*_numbered(2), partition=partition)
        watcher = _Watcher()
        async with self.open() as source:
            source.watch_withdrawals(watcher)
            records = await self.read(source, 8)
            async with self.rival():
                await wait_all_tasks_blocked()
                for record in records[:-1]:
                    source.account(_span(record))
                held_back = records[-1].topic, records[-1].partition, records[-1].generation
                assert not any(held_back in call for call in watcher.calls)
                source.account(_span(records[-1]))
                await watcher.called.wait()
        told = [each for call in watcher.calls for each in call]
        assert len(told) == len(set(told))
        assert set(told) < {(r.topic, r.partition, r.generation) for r in records}

    @in_trio
    async def test_what_is_given_back_when_a_drain_begins_is_not_waited_for(self) -> None:
        for partition in range(4):
            self.put(*_numbered(3), partition=partition)
        watcher = _Watcher()
        async with self.open() as source:
            records = await self.read(source, 12)
            asked: set[tuple[str, int, int]] = set()

            def give_back(leaving: Withdrawn) -> list[OffsetRange]:
                asked.update(leaving)
                return [
                    _span(record)
                    for record in records
                    if (record.topic, record.partition, record.generation) in asked
                ]

            source.watch_withdrawals(watcher, on_leaving=give_back)
            async with self.rival():
                await watcher.called.wait()
        assert set(watcher.calls[0]) <= asked
