"""What the tests of the Kafka client share: a group on the mock broker, an observer to wait on, small steps."""

from __future__ import annotations

import socket
import struct
import threading
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import attrs
import trio

from stationmaster.batch import OffsetRange, Record
from stationmaster.events import (
    OffsetsCommitted,
)
from stationmaster.kafka import KafkaSettings, pump

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable, Iterator

    import pytest

    from stationmaster.abc import Source
    from stationmaster.events import Event
    from tests.kafka_broker import KafkaBroker

EventT = TypeVar("EventT")

PATIENCE_S = 30.0
"""For what takes well under this, on a busy machine too."""


@attrs.define(eq=False)
class Listener:
    """An observer that one can wait on."""

    detailed: bool = False
    events: list[Event] = attrs.field(factory=list)
    _heard: trio.lowlevel.ParkingLot = attrs.field(factory=trio.lowlevel.ParkingLot)

    def observe(self, event: Event, /) -> None:
        self.events.append(event)
        self._heard.unpark_all()

    def of(self, kind: type[EventT]) -> list[EventT]:
        return [event for event in self.events if isinstance(event, kind)]

    async def hears(
        self, kind: type[EventT], which: Callable[[EventT], bool] = lambda _: True
    ) -> EventT:
        """Wait for the first such event, from the beginning on."""
        with trio.fail_after(PATIENCE_S):
            while True:
                for event in self.of(kind):
                    if which(event):
                        return event
                await self._heard.park()


@attrs.define(eq=False)
class Group:
    """A consumer group on a topic."""

    broker: KafkaBroker
    topic: str = attrs.field(init=False)
    name: str = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.topic = self.broker.create_topic()
        self.name = self.broker.new_name("group")

    def settings(self, **more: Any) -> KafkaSettings:
        some: dict[str, Any] = {
            "bootstrap_servers": self.broker.bootstrap_servers,
            "group_id": self.name,
            "topics": (self.topic,),
            "group_protocol": "consumer",
            "commit_interval_s": 0.05,
        }
        return KafkaSettings(**(some | more))

    def fill(self, count: int, partitions: Iterable[int] = (0,)) -> None:
        for partition in partitions:
            values = [b"%d/%d" % (partition, number) for number in range(count)]
            self.broker.produce(self.topic, values, partition=partition)

    def committed(self) -> dict[int, int]:
        return self.broker.committed(self.name, self.topic)


async def read(source: Source, count: int) -> list[Record]:
    records: list[Record] = []
    with trio.fail_after(PATIENCE_S):
        while len(records) < count:
            records += await source.poll()
    return records


def account(source: Source, records: Iterable[Record]) -> None:
    for r in records:
        source.account(
            OffsetRange(
                topic=r.topic,
                partition=r.partition,
                first=r.offset,
                last=r.offset,
                generation=r.generation,
            )
        )


def places(records: Iterable[Record]) -> list[tuple[int, int]]:
    return [(record.partition, record.offset) for record in records]


def everything(count: int, partitions: Iterable[int] = (0,)) -> list[tuple[int, int]]:
    return [(partition, offset) for partition in partitions for offset in range(count)]


def count_committed(listener: Listener) -> int:
    spans = [span for event in listener.of(OffsetsCommitted) for span in event.offsets]
    return sum(span.last - span.first + 1 for span in spans)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def pump_threads() -> Iterator[threading.Thread]:
    return (thread for thread in threading.enumerate() if thread.name == "stationmaster pump")


@asynccontextmanager
async def open_forwarder(port: int, target: str) -> AsyncIterator[None]:
    """Forward connections to this port to the target."""
    host, _, number = target.partition(":")

    async def copy(source: trio.SocketStream, sink: trio.SocketStream) -> None:
        try:
            async for chunk in source:
                await sink.send_all(chunk)
        except trio.BrokenResourceError:
            pass  # the other side went first

    async def forward(stream: trio.SocketStream) -> None:
        async with await trio.open_tcp_stream(host, int(number)) as other:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(copy, stream, other)
                nursery.start_soon(copy, other, stream)

    async with trio.open_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(port, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, forward, listeners)
        yield
        nursery.cancel_scope.cancel()


def in_the_thread(monkeypatch: pytest.MonkeyPatch, action: Callable[[pump.Pump], None]) -> None:
    """Let the pump's thread do this once, at its next turn: nobody else may touch its client and its book."""
    keep_house = pump.Pump._keep_house

    def act_first(self: pump.Pump, now: float) -> None:
        monkeypatch.setattr(pump.Pump, "_keep_house", keep_house)
        action(self)
        keep_house(self, now)

    monkeypatch.setattr(pump.Pump, "_keep_house", act_first)


def produce_raw(servers: str, topic: str, value: bytes, *, header: tuple[bytes, bytes]) -> None:
    """Append a record to partition 0 by Kafka's own protocol (Produce 7): the client would not write such a header."""
    name, content = header
    body = b"\0\0\0" + _varint(-1) + _varint(len(value)) + value  # attributes, both deltas; no key
    body += _varint(1) + _varint(len(name)) + name + _varint(len(content)) + content
    record = _varint(len(body)) + body
    # epoch, magic, no checksum; attributes, last delta, timestamps, no producer, one record
    rest = struct.pack(">ibIhiqqqhii", -1, 2, 0, 0, 0, 1000, 1000, -1, -1, -1, 1) + record
    batch = struct.pack(">qi", 0, len(rest)) + rest
    encoded = topic.encode()
    request = struct.pack(">hhih", 0, 7, 1, -1)  # key, version, correlation, no client id
    request += struct.pack(">hhiih", -1, -1, 5000, 1, len(encoded)) + encoded
    request += struct.pack(">iii", 1, 0, len(batch)) + batch
    host, _, port = servers.partition(":")
    with socket.create_connection((host, int(port)), PATIENCE_S) as sock:
        sock.sendall(struct.pack(">i", len(request)) + request)
        answer = sock.recv(1000)
    error: int = struct.unpack_from(">h", answer, 4 + 4 + 4 + 2 + len(encoded) + 4 + 4)[0]
    assert error == 0


def _varint(number: int) -> bytes:
    left = number * 2 if number >= 0 else -number * 2 - 1
    encoded = bytearray()
    while left > 127:
        encoded.append(left & 127 | 128)
        left >>= 7
    return bytes([*encoded, left])
