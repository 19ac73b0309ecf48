"""The Kafka source, the file source and the one in memory keep the contract."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
import trio

from stationmaster.files import open_file_source
from stationmaster.kafka import KafkaSettings, open_kafka_source
from stationmaster.testing.contracts import (
    BoundedSourceContract,
    BrokerSourceContract,
    SourceContract,
)
from stationmaster.testing.contracts.running import in_trio
from stationmaster.testing.source import MemorySource

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from stationmaster.abc import Source, Withdrawn
    from tests.kafka_broker import KafkaBroker


class TestMemorySource(BrokerSourceContract):
    @pytest.fixture(autouse=True)
    def _source(self) -> None:
        self.source = MemorySource(max_poll_messages=self.at_most)
        self.partitions: set[tuple[str, int]] = set()

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


class TestBoundedMemorySource(BoundedSourceContract):
    @pytest.fixture(autouse=True)
    def _source(self) -> None:
        self.source = MemorySource(max_poll_messages=self.at_most)
        self.source.end()

    def put(self, *values: bytes | None, partition: int = 0, **more: Any) -> None:
        for value in values:
            self.source.put(self.topic, partition, value, **more)

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Source]:
        yield self.source


class TestKafkaSource(BrokerSourceContract):
    @pytest.fixture(autouse=True)
    def _broker(self, kafka_broker: KafkaBroker) -> None:
        self.broker = kafka_broker
        self.topic = kafka_broker.create_topic()
        self.group = kafka_broker.new_name("group")

    def put(self, *values: bytes | None, partition: int = 0, **more: Any) -> None:
        self.broker.produce(self.topic, values, partition=partition, **more)

    def open(self) -> AbstractAsyncContextManager[Source]:
        settings = KafkaSettings(
            bootstrap_servers=self.broker.bootstrap_servers,
            group_id=self.group,
            topics=(self.topic,),
            max_poll_messages=self.at_most,
            group_protocol="consumer",
        )
        return open_kafka_source(settings)

    @asynccontextmanager
    async def rival(self) -> AsyncIterator[None]:
        async with self.open():
            yield

    def committed(self) -> int:
        return self.broker.committed(self.group, self.topic).get(0, 0)


class TestFileSource(SourceContract, BoundedSourceContract):
    accounted = 0

    @pytest.fixture(autouse=True)
    def _path(self, tmp_path: Path) -> None:
        self.path = tmp_path / "readings.jsonl"

    def put(self, *values: bytes | None, partition: int = 0, **more: Any) -> None:
        assert partition == 0
        assert not more
        with self.path.open("ab") as file:
            file.writelines((value or b"") + b"\n" for value in values)

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Source]:
        async with open_file_source(self.path, max_poll_messages=self.at_most) as source:
            yield source
        self.accounted = source.accounted

    def committed(self) -> int:
        return self.accounted

    @in_trio
    async def test_a_file_takes_nothing_back_whoever_comes(self) -> None:
        self.put(b"1", b"2")
        withdrawn: list[Withdrawn] = []
        async with self.open() as source:
            source.watch_withdrawals(withdrawn.append)
            async with self.open() as another:
                await self.read(source, 2)
                await self.read(another, 2)
        assert not withdrawn
