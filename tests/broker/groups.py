"""Consumer groups of the tests on a real broker: members that read all the time, and waiting for what they see."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import attrs
import trio

from stationmaster.batch import OffsetRange
from stationmaster.events import (
    PartitionsAssigned,
    PartitionsLost,
    PartitionsRevoked,
    SourceTrouble,
)
from stationmaster.kafka import KafkaSettings, KafkaSource, open_kafka_source

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable

    from stationmaster.batch import Record
    from stationmaster.events import Event
    from tests.broker.operating import Operator

EventT = TypeVar("EventT")

PATIENCE_S = 40.0
"""For what takes well under this, on a busy machine too."""

SESSION_S = 3.0
"""After this long without a heartbeat the broker takes a member for dead (KIP-848: as in server.properties)."""


@attrs.define(eq=False)
class Group:
    """A consumer group on a topic of its own."""

    operator: Operator
    partitions: int = 4
    defaults: dict[str, Any] = attrs.field(factory=dict)
    topic: str = attrs.field(init=False)
    name: str = attrs.field(init=False)
    _changed: trio.lowlevel.ParkingLot = attrs.field(factory=trio.lowlevel.ParkingLot, init=False)

    def __attrs_post_init__(self) -> None:
        self.topic = self.operator.create_topic(partitions=self.partitions)
        self.name = self.operator.new_name("group")

    def settings(self, **more: Any) -> KafkaSettings:
        """Return the settings of a member: the test's word counts before the group's, that before these."""
        some = self.defaults | more
        classic = some.get("group_protocol", "classic") == "classic"
        quick = {"heartbeat.interval.ms": 300} if classic else {}
        basic: dict[str, Any] = {
            "bootstrap_servers": self.operator.bootstrap,
            "group_id": self.name,
            "topics": (self.topic,),
            "commit_interval_s": 0.05,
            **({"session_timeout_s": SESSION_S} if classic else {}),
        }
        options = {"reconnect.backoff.max.ms": 500} | quick | some.pop("options", {})
        return KafkaSettings(**(basic | some), options=options)

    @asynccontextmanager
    async def open_member(self, *, accounts: bool = True, **more: Any) -> AsyncIterator[Member]:
        """Let a member join and read until the block ends."""
        member = Member(self, accounts)
        async with (
            open_kafka_source(self.settings(**more), observer=member) as member.source,
            trio.open_nursery() as nursery,
        ):
            nursery.start_soon(member.read)
            yield member
            nursery.cancel_scope.cancel()

    def fill(self, count: int, *, first: int = 0) -> None:
        """Append `count` records to every partition."""
        for partition in range(self.partitions):
            values = [b"%d/%d" % (partition, first + number) for number in range(count)]
            self.operator.produce(self.topic, values, partition=partition)

    def committed(self) -> dict[int, int]:
        return self.operator.committed(self.name, self.topic)

    def notify(self) -> None:
        """Something changed."""
        self._changed.unpark_all()

    async def until(self, holds: Callable[[], object]) -> None:
        """Wait until this holds; it is asked again whenever a member of the group reads or hears something."""
        with trio.fail_after(PATIENCE_S):
            while not holds():
                await self._changed.park()

    async def until_shared(self, *members: Member) -> None:
        """Wait until these hold all partitions, each about as many as the others."""
        fair = {self.partitions // len(members), -(-self.partitions // len(members))}

        def is_shared() -> bool:
            held = [member.held for member in members]
            return (
                len(set().union(*held)) == self.partitions and {len(each) for each in held} <= fair
            )

        await self.until(is_shared)

    async def until_committed(self, wanted: dict[int, int]) -> None:
        """Wait until the broker holds these offsets."""
        await eventually(lambda: self.committed() == wanted)

    async def until_joined(self, members: int) -> None:
        """Wait until the broker has so many members."""
        await eventually(lambda: len(self.operator.members(self.name)) == members)


async def eventually(holds: Callable[[], object]) -> None:
    """Wait until this holds; for what nobody tells, such as the broker's mind."""
    with trio.fail_after(PATIENCE_S):
        while not holds():  # noqa: ASYNC110
            await trio.sleep(0.05)


@attrs.define(eq=False)
class Member:
    """A source, what it read and what it said. An observer."""

    group: Group
    accounts: bool
    """Whether records are accounted for as soon as they are read."""
    detailed: bool = attrs.field(default=False, init=False)
    source: KafkaSource = attrs.field(init=False)
    records: list[Record] = attrs.field(factory=list, init=False)
    events: list[Event] = attrs.field(factory=list, init=False)
    held: set[int] = attrs.field(factory=set, init=False)
    """The partitions it has now."""

    def observe(self, event: Event, /) -> None:
        self.events.append(event)
        match event:
            case PartitionsAssigned():
                self.held |= {partition for _, partition in event.partitions}
            case PartitionsRevoked() | PartitionsLost():
                self.held -= {partition for _, partition in event.partitions}
            case _:
                pass
        self.group.notify()

    async def read(self) -> None:
        while True:
            records = await self.source.poll()
            self.records += records
            if self.accounts:
                self.account(records)
            self.group.notify()

    def account(self, records: Iterable[Record]) -> None:
        """Say that these are uploaded."""
        for each in records:
            self.source.account(
                OffsetRange(
                    topic=each.topic,
                    partition=each.partition,
                    first=each.offset,
                    last=each.offset,
                    generation=each.generation,
                )
            )

    def of(self, kind: type[EventT]) -> list[EventT]:
        return [event for event in self.events if isinstance(event, kind)]

    @property
    def troubles(self) -> set[str]:
        """The kinds that were said."""
        return {event.kind for event in self.of(SourceTrouble)}

    async def hears(
        self, kind: type[EventT], which: Callable[[EventT], object] = lambda _: True
    ) -> EventT:
        """Wait for the first such event, from the beginning on."""
        await self.group.until(lambda: any(which(event) for event in self.of(kind)))
        return next(event for event in self.of(kind) if which(event))

    async def has_read(self, count: int) -> None:
        """Wait until it has read so many records in all."""
        await self.group.until(lambda: len(self.records) >= count)

    async def troubled(self, kind: str) -> SourceTrouble:
        """Wait for this kind of trouble."""
        return await self.hears(SourceTrouble, lambda event: event.kind == kind)


def places(*members: Member) -> list[tuple[int, int]]:
    """Return (partition, offset) of everything they read, sorted."""
    return sorted(
        (record.partition, record.offset) for member in members for record in member.records
    )


def everything(partitions: Iterable[int], count: int) -> list[tuple[int, int]]:
    """Return (partition, offset) of the first `count` records of each."""
    return sorted((partition, offset) for partition in partitions for offset in range(count))
