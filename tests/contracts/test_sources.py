"""What every source promises, asked of the Kafka source, of the file source and of the one in memory."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import TYPE_CHECKING, Any, Protocol

import attrs
import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from stationmaster.batch import OffsetRange, Record
from stationmaster.files import open_file_source
from stationmaster.kafka import KafkaSettings, open_kafka_source
from stationmaster.testing.source import MemorySource

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from stationmaster.abc import Source, Withdrawn
    from tests.kafka_broker import KafkaBroker

AT_MOST = 4
"""`max_poll_messages` of every source here."""
PATIENCE_S = 20.0
"""For what takes well under a second."""


class World(Protocol):
    """A topic with records, and a reader that can come, go and come again."""

    topic: str

    def put(self, *values: bytes | None, partition: int = 0, **more: Any) -> None: ...
    def open(self) -> AbstractAsyncContextManager[Source]: ...
    def rival(self) -> AbstractAsyncContextManager[None]:
        """Let somebody else join: at least one of four partitions leaves the reader, after its drain."""
        ...

    def committed(self) -> int:
        """Return the next offset of partition 0 after what is committed; 0 if nothing is."""
        ...


@attrs.define
class MemoryWorld:
    topic: str = "readings"
    source: MemorySource = attrs.field(factory=lambda: MemorySource(max_poll_messages=AT_MOST))
    partitions: set[tuple[str, int]] = attrs.field(factory=set)

    def put(self, *values: bytes | None, partition: int = 0, **more: Any) -> None:
        self.partitions.add((self.topic, partition))
        for value in values:
            self.source.put(self.topic, partition, value, **more)

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Source]:
        yield self.source
        self.source.watch_withdrawals(lambda _: None)  # the reader has left
        self.source.lose(sorted(self.partitions))
        self.source.assign(sorted(self.partitions))

    @asynccontextmanager
    async def rival(self) -> AsyncIterator[None]:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.source.revoke, [(self.topic, 2), (self.topic, 3)])
            yield
        self.source.assign([(self.topic, 2), (self.topic, 3)])

    def committed(self) -> int:
        return self.source.committed.get((self.topic, 0), 0)


@attrs.define
class KafkaWorld:
    broker: KafkaBroker
    topic: str = attrs.field(init=False)
    group: str = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.topic = self.broker.create_topic()
        self.group = self.broker.new_name("group")

    def put(
        self,
        *values: bytes | None,
        partition: int = 0,
        **more: Any,
    ) -> None:
        self.broker.produce(self.topic, values, partition=partition, **more)

    def open(self) -> AbstractAsyncContextManager[Source]:
        settings = KafkaSettings(
            bootstrap_servers=self.broker.bootstrap_servers,
            group_id=self.group,
            topics=(self.topic,),
            max_poll_messages=AT_MOST,
            group_protocol="consumer",
        )
        return open_kafka_source(settings)

    @asynccontextmanager
    async def rival(self) -> AsyncIterator[None]:
        async with self.open():
            yield

    def committed(self) -> int:
        return self.broker.committed(self.group, self.topic).get(0, 0)


@attrs.define
class FileWorld:
    path: Path
    topic: str = "readings"
    accounted: int = 0

    def put(self, *values: bytes | None, partition: int = 0, **more: Any) -> None:
        assert partition == 0
        assert not more
        with self.path.open("ab") as file:
            file.writelines((value or b"") + b"\n" for value in values)

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Source]:
        async with open_file_source(self.path, max_poll_messages=AT_MOST) as source:
            yield source
        self.accounted = source.accounted

    @asynccontextmanager
    async def rival(self) -> AsyncIterator[None]:
        yield

    def committed(self) -> int:
        return self.accounted


@pytest.fixture
def memory_world() -> World:
    return MemoryWorld()


@pytest.fixture
def kafka_world(kafka_broker: KafkaBroker) -> World:
    return KafkaWorld(kafka_broker)


@pytest.fixture
def file_world(tmp_path: Path) -> World:
    return FileWorld(tmp_path / "readings.jsonl")


@pytest.fixture(params=["memory_world", "kafka_world", "file_world"])
def any_world(request: pytest.FixtureRequest) -> World:
    world: World = request.getfixturevalue(request.param)
    return world


@pytest.fixture(params=["memory_world", "kafka_world"])
def broker_world(request: pytest.FixtureRequest) -> World:
    world: World = request.getfixturevalue(request.param)
    return world


@pytest.fixture(params=["memory", "file"])
def bounded_world(request: pytest.FixtureRequest, tmp_path: Path) -> World:
    if request.param == "file":
        return FileWorld(tmp_path / "readings.jsonl")
    world = MemoryWorld()
    world.source.end()
    return world


async def read(source: Source, count: int) -> list[Record]:
    """Poll until so many records came, and hold every poll to the contract."""
    records: list[Record] = []
    with trio.fail_after(PATIENCE_S):
        while len(records) < count:
            polled = await source.poll()
            assert 1 <= len(polled) <= AT_MOST
            records += polled
    assert len(records) == count
    return records


def span(
    first: Record, last: Record | None = None, *, generation: int | None = None
) -> OffsetRange:
    return OffsetRange(
        topic=first.topic,
        partition=first.partition,
        first=first.offset,
        last=(last or first).offset,
        generation=first.generation if generation is None else generation,
    )


def numbered(count: int) -> list[bytes]:
    return [b"%d" % number for number in range(count)]


# ------------------------------------------------------------------------------------------------------------ poll


async def test_records_come_in_order_and_each_once(any_world: World) -> None:
    any_world.put(*numbered(10))
    async with any_world.open() as source:
        records = await read(source, 10)
    assert [record.value for record in records] == numbered(10)
    assert [record.offset for record in records] == list(range(10))
    assert {(record.topic, record.partition) for record in records} == {(any_world.topic, 0)}


async def test_every_partition_is_read_in_its_own_order(broker_world: World) -> None:
    for partition in range(4):
        broker_world.put(*numbered(5), partition=partition)
    async with broker_world.open() as source:
        records = await read(source, 20)
    for partition in range(4):
        values = [record.value for record in records if record.partition == partition]
        assert values == numbered(5)


async def test_tombstones_empty_values_headers_and_timestamps_come_as_they_are(
    broker_world: World,
) -> None:
    headers = (("trace", b"\x00\xff"), ("none", None), ("trace", b"again"))
    broker_world.put(None, timestamp_ms=1_700_000_000_123, headers=headers)
    broker_world.put(b"", timestamp_ms=1_700_000_000_124)
    async with broker_world.open() as source:
        tombstone, empty = await read(source, 2)
    assert (tombstone.value, empty.value) == (None, b"")
    assert (tombstone.headers, empty.headers) == (headers, ())
    assert tombstone.timestamp_ms == 1_700_000_000_123
    assert empty.timestamp_ms == 1_700_000_000_124


async def test_a_cancelled_poll_raises_and_loses_no_record(any_world: World) -> None:
    any_world.put(*numbered(6))
    records: list[Record] = []
    async with any_world.open() as source:
        with trio.fail_after(PATIENCE_S):
            while len(records) < 6:
                with trio.CancelScope() as scope:
                    scope.cancel()
                    await source.poll()
                assert scope.cancelled_caught
                records += await source.poll()
    assert [record.value for record in records] == numbered(6)


async def test_a_poll_that_was_waiting_when_it_was_cancelled_loses_no_record(
    broker_world: World,
) -> None:
    found: list[Record] = []

    async def poll_once(source: Source) -> None:
        found.extend(await source.poll())

    broker_world.put(b"first")
    async with broker_world.open() as source:
        await read(source, 1)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(poll_once, source)
            await wait_all_tasks_blocked()
            broker_world.put(b"second")
            nursery.cancel_scope.cancel()
        if not found:  # the poll may have won
            found = await read(source, 1)
    assert [record.value for record in found] == [b"second"]


async def test_a_waiting_poll_wakes_up_for_a_new_record(broker_world: World) -> None:
    broker_world.put(b"first")
    found: list[Record] = []

    async def wait_for_one(source: Source) -> None:
        found.extend(await read(source, 1))

    async with broker_world.open() as source:
        await read(source, 1)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait_for_one, source)
            await wait_all_tasks_blocked()
            broker_world.put(b"second")
    assert [record.value for record in found] == [b"second"]


async def test_at_the_end_every_poll_says_so(bounded_world: World) -> None:
    bounded_world.put(b"only")
    async with bounded_world.open() as source:
        await read(source, 1)
        for _ in range(2):
            with pytest.raises(trio.EndOfChannel):
                await source.poll()


# --------------------------------------------------------------------------------------------------------- account


async def test_nothing_is_committed_before_it_is_accounted_for(any_world: World) -> None:
    any_world.put(*numbered(4))
    async with any_world.open() as source:
        await read(source, 4)
    assert any_world.committed() == 0


async def test_what_is_accounted_for_is_committed_when_the_source_closes(any_world: World) -> None:
    any_world.put(*numbered(4))
    async with any_world.open() as source:
        records = await read(source, 4)
        source.account(span(records[0], records[2]))
    assert any_world.committed() == 3


async def test_a_hole_holds_the_commit_back(any_world: World) -> None:
    any_world.put(*numbered(6))
    async with any_world.open() as source:
        records = await read(source, 6)
        source.account(span(records[0], records[1]))
        source.account(span(records[3], records[5]))
    assert any_world.committed() == 2


async def test_the_order_of_accounting_does_not_matter_once_the_hole_is_filled(
    any_world: World,
) -> None:
    any_world.put(*numbered(6))
    async with any_world.open() as source:
        records = await read(source, 6)
        source.account(span(records[4], records[5]))
        source.account(span(records[0]))
        source.account(span(records[1], records[3]))
    assert any_world.committed() == 6


async def test_accounting_for_another_generation_partition_or_topic_changes_nothing(
    any_world: World,
) -> None:
    any_world.put(*numbered(3))
    async with any_world.open() as source:
        records = await read(source, 3)
        whole = span(records[0], records[2])
        for generation in (whole.generation - 1, whole.generation + 1):
            source.account(attrs.evolve(whole, generation=generation))
        source.account(attrs.evolve(whole, partition=3))
        source.account(attrs.evolve(whole, topic="another"))
    assert any_world.committed() == 0


async def test_accounting_after_the_end_harms_nobody(any_world: World) -> None:
    any_world.put(*numbered(3))
    async with any_world.open() as source:
        records = await read(source, 3)
    source.account(span(records[0], records[2]))


async def test_the_next_reader_begins_at_the_first_record_that_was_not_accounted_for(
    broker_world: World,
) -> None:
    broker_world.put(*numbered(6))
    async with broker_world.open() as source:
        records = await read(source, 6)
        source.account(span(records[0], records[1]))
        source.account(span(records[3]))
    async with broker_world.open() as source:
        again = await read(source, 4)
        assert [record.offset for record in again] == [2, 3, 4, 5]
        source.account(span(again[0], again[3]))
    assert broker_world.committed() == 6


async def test_a_second_accounting_of_an_old_range_does_not_take_the_commit_back(
    any_world: World,
) -> None:
    any_world.put(*numbered(6))
    async with any_world.open() as source:
        records = await read(source, 6)
        source.account(span(records[0], records[5]))
        source.account(span(records[0], records[1]))
    assert any_world.committed() == 6


# ----------------------------------------------------------------------------------------------------- withdrawals


@attrs.define(eq=False)
class Watcher:
    """Remembers what was withdrawn, and can be waited for."""

    calls: list[set[tuple[str, int, int]]] = attrs.field(factory=list)
    called: trio.Event = attrs.field(factory=trio.Event)

    def __call__(self, withdrawn: Withdrawn) -> None:
        self.calls.append(set(withdrawn))
        assert len(self.calls[-1]) == len(withdrawn)
        self.called.set()


async def test_what_a_rebalance_takes_away_is_withdrawn_once_and_only_after_its_drain(
    broker_world: World,
) -> None:
    for partition in range(4):
        broker_world.put(*numbered(2), partition=partition)
    watcher = Watcher()
    async with broker_world.open() as source:
        source.watch_withdrawals(watcher)
        records = await read(source, 8)
        async with broker_world.rival():
            await wait_all_tasks_blocked()
            for record in records[:-1]:
                source.account(span(record))
            held_back = records[-1].topic, records[-1].partition, records[-1].generation
            assert not any(held_back in call for call in watcher.calls)
            source.account(span(records[-1]))
            with trio.fail_after(PATIENCE_S):
                await watcher.called.wait()
    told = [each for call in watcher.calls for each in call]
    assert len(told) == len(set(told))
    assert set(told) < {(r.topic, r.partition, r.generation) for r in records}


async def test_nothing_is_withdrawn_while_nobody_takes_anything_away(any_world: World) -> None:
    any_world.put(*numbered(4))
    watcher = Watcher()
    async with any_world.open() as source:
        source.watch_withdrawals(watcher)
        records = await read(source, 4)
        source.account(span(records[0], records[3]))
        assert not watcher.calls


async def test_a_file_takes_nothing_back_whoever_comes(file_world: World) -> None:
    file_world.put(*numbered(2))
    watcher = Watcher()
    async with file_world.open() as source:
        source.watch_withdrawals(watcher)
        async with file_world.rival():
            await read(source, 2)
    assert not watcher.calls
