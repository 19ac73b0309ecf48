"""The Kafka source against librdkafka's mock cluster, a process of its own. Real sockets, real threads, real clock."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import threading
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import attrs
import pytest
import trio
from confluent_kafka import KafkaError, TopicPartition

from stationmaster.batch import OffsetRange, Record
from stationmaster.errors import SourceError
from stationmaster.events import (
    OffsetsCommitted,
    PartitionsAssigned,
    PartitionsLost,
    PartitionsRevoked,
    SourcePaused,
    SourceRecovered,
    SourceTrouble,
)
from stationmaster.kafka import KafkaSettings, open_kafka_source, pump
from stationmaster.kafka.handover import Command, Handover
from tests.kafka_broker import KafkaBroker, run_kafka_broker

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable, Iterator

    from stationmaster.abc import Source
    from stationmaster.events import Event

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


@pytest.fixture
def group(kafka_broker: KafkaBroker) -> Group:
    return Group(kafka_broker)


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


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def pump_threads() -> Iterator[threading.Thread]:
    return (thread for thread in threading.enumerate() if thread.name == "stationmaster pump")


async def test_a_commit_goes_through_while_polling_goes_on(group: Group) -> None:
    listener = Listener()
    async with (
        open_kafka_source(group.settings(), observer=listener) as source,
        trio.open_nursery() as nursery,
    ):
        await listener.hears(PartitionsAssigned)
        group.fill(3)
        account(source, await read(source, 3))
        nursery.start_soon(source.poll)  # waits, and the thread polls
        taken = await listener.hears(OffsetsCommitted, lambda event: event.offsets[0].last == 2)
        assert group.committed() == {0: 3}
        nursery.cancel_scope.cancel()
    assert taken.offsets[0].topic == group.topic
    assert not listener.of(SourceTrouble)


async def test_commits_only_ever_move_forward_and_name_every_offset_once(group: Group) -> None:
    group.fill(60)
    listener = Listener()
    settings = group.settings(max_poll_messages=1, commit_interval_s=0.001)
    async with open_kafka_source(settings, observer=listener) as source:
        for _ in range(60):
            (record,) = await source.poll()
            account(source, [record])
    offsets = [one for event in listener.of(OffsetsCommitted) for one in event.offsets]
    covered = [offset for one in offsets for offset in range(one.first, one.last + 1)]
    assert covered == list(range(60))
    assert len(offsets) > 1


async def test_statistics_tell_lag_and_what_is_outstanding(group: Group) -> None:
    group.fill(5)
    listener = Listener()
    async with open_kafka_source(group.settings(), observer=listener) as source:
        assert source.statistics().partitions == ()
        await listener.hears(PartitionsAssigned)
        idle = next(p for p in source.statistics().partitions if p.partition == 1)
        assert (idle.generation, idle.committed, idle.lag, idle.outstanding) == (1, None, None, 0)
        records = await read(source, 5)
        account(source, records[:3])
        await listener.hears(OffsetsCommitted, lambda event: event.offsets[0].last == 2)
        group.fill(2)
        await read(source, 2)
        account(source, records[3:4])
        await listener.hears(OffsetsCommitted, lambda event: event.offsets[0].last == 3)
        busy = next(p for p in source.statistics().partitions if p.partition == 0)
        assert (busy.committed, busy.high_watermark, busy.lag, busy.outstanding) == (4, 7, 3, 3)
        assert not source.statistics().paused
        assert source.statistics().pump_idle_s < PATIENCE_S


# ----------------------------------------------------------------------------------------------------- backpressure


async def test_when_nobody_polls_the_partitions_are_paused_and_nothing_is_lost_or_doubled(
    group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pump, "_STALL_S", 0.2)
    group.fill(40, range(4))
    listener = Listener()
    settings = group.settings(max_poll_messages=10)
    async with open_kafka_source(settings, observer=listener) as source:
        await listener.hears(SourcePaused)
        assert source.statistics().paused
        group.fill(1, [0])  # arrives while all is paused
        records = await read(source, 161)
        await listener.hears(SourcePaused, lambda event: not event.paused)
    assert sorted(places(records)) == sorted([*everything(40, range(4)), (0, 40)])


async def test_a_partition_that_is_assigned_during_a_pause_is_paused_as_well(
    group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pump, "_STALL_S", 0.0)
    group.fill(3)
    port = free_port()
    listener = Listener()
    settings = group.settings(bootstrap_servers=f"127.0.0.1:{port}")
    async with open_kafka_source(settings, observer=listener) as source:
        source._pump._credits = 0
        await listener.hears(SourcePaused)
        async with open_forwarder(port, group.broker.bootstrap_servers):
            await listener.hears(PartitionsAssigned)
            with trio.move_on_after(0.5):
                await source.poll()
                pytest.fail("a record came although there was no credit")
            source._handover.commands.put(Command.MORE)
            assert places(await read(source, 3)) == everything(3)


async def test_a_message_that_comes_during_a_pause_all_the_same_is_kept(
    group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pump, "_STALL_S", 0.1)
    group.fill(30)
    listener = Listener()
    async with open_kafka_source(group.settings(max_poll_messages=10), observer=listener) as source:
        await listener.hears(SourcePaused)
        resumed, kept = threading.Event(), threading.Event()

        def resume_once(self: pump.Pump) -> None:  # in the thread that owns the client
            if not resumed.is_set():
                resumed.set()
                self._consumer.resume(self._consumer.assignment())
            elif self._kept:
                kept.set()

        monkeypatch.setattr(pump.Pump, "_commit", resume_once)
        assert await trio.to_thread.run_sync(kept.wait, PATIENCE_S)
        monkeypatch.undo()
        assert places(await read(source, 30)) == everything(30)


async def test_closing_with_polls_that_nobody_took_drops_and_counts_them(group: Group) -> None:
    group.fill(50)
    listener = Listener()
    settings = group.settings(max_poll_messages=10)
    async with open_kafka_source(settings, observer=listener) as source:
        await listener.hears(SourcePaused)
    assert source.statistics().dropped_polls == pump.CREDITS
    assert group.committed() == {}
    async with open_kafka_source(settings) as source:
        assert places(await read(source, 50)) == everything(50)


async def test_after_closing_a_poll_is_refused(group: Group) -> None:
    async with open_kafka_source(group.settings()) as source:
        pass
    with pytest.raises(trio.ClosedResourceError):
        await source.poll()


# -------------------------------------------------------------------------------------------------------- rebalance


@pytest.fixture
def revoke_begins(monkeypatch: pytest.MonkeyPatch) -> trio.Event:
    """Give an event that is set when a pump has asked for a drain."""
    begins = trio.Event()
    revoking = Handover.revoking

    def tell(handover: Handover, drain: Any) -> None:
        revoking(handover, drain)
        begins.set()

    monkeypatch.setattr(Handover, "revoking", tell)
    return begins


async def test_a_revoke_waits_for_what_was_handed_out_and_commits_it(
    group: Group, revoke_begins: trio.Event
) -> None:
    group.fill(10, range(4))
    listener = Listener()
    async with open_kafka_source(group.settings(), observer=listener) as source:
        records = await read(source, 40)
        async with open_kafka_source(group.settings()) as joined:
            with trio.fail_after(PATIENCE_S):
                await revoke_begins.wait()
            account(source, records[:-1])
            assert not listener.of(PartitionsRevoked)
            account(source, records[-1:])
            revoked = await listener.hears(PartitionsRevoked)
            assert revoked.drained
            gone = {partition for _, partition in revoked.partitions}
            assert len(gone) == 2
            assert {group.committed()[partition] for partition in gone} == {10}
            group.fill(1, range(4))
            theirs = await read(joined, 2)
            ours = await read(source, 2)
    assert sorted(places(theirs)) == [(partition, 10) for partition in sorted(gone)]
    assert {record.generation for record in ours} == {1}  # retained: the generation stays


async def test_a_revoke_ends_at_its_limit_and_late_work_is_not_committed(group: Group) -> None:
    group.fill(10, range(4))
    listener = Listener()
    settings = group.settings(drain_timeout_s=0.2)
    async with open_kafka_source(settings, observer=listener) as source:
        records = await read(source, 40)
        async with open_kafka_source(settings) as joined:
            revoked = await listener.hears(PartitionsRevoked)
            assert not revoked.drained
            gone = {partition for _, partition in revoked.partitions}
            account(source, records)  # too late for those two
            theirs = await read(joined, 20)
            assert sorted(places(theirs)) == everything(10, sorted(gone))
    kept = {0, 1, 2, 3} - gone
    assert group.committed() == dict.fromkeys(sorted(kept), 10)


async def test_what_waits_unpolled_of_a_revoked_partition_is_dropped_and_read_by_its_next_owner(
    group: Group,
) -> None:
    group.fill(10, range(4))
    listener = Listener()
    settings = group.settings(max_poll_messages=10)
    async with open_kafka_source(settings, observer=listener) as source:
        await listener.hears(SourcePaused)
        async with open_kafka_source(group.settings()) as joined:
            revoked = await listener.hears(PartitionsRevoked)
            assert revoked.drained  # nothing was handed out
            theirs = await read(joined, 20)
            ours = await read(source, 20)
    assert sorted(places([*theirs, *ours])) == everything(10, range(4))


async def test_a_partition_that_comes_back_has_a_new_generation_and_begins_at_its_commit(
    group: Group,
) -> None:
    group.fill(4, range(4))
    listener = Listener()
    settings = group.settings(drain_timeout_s=0.1)
    async with open_kafka_source(settings, observer=listener) as source:
        records = await read(source, 16)
        account(source, [record for record in records if record.offset < 2])
        async with open_kafka_source(settings):
            revoked = await listener.hears(PartitionsRevoked)
            gone = {partition for _, partition in revoked.partitions}
        again = await read(source, 4)
    assert sorted(places(again)) == [(p, offset) for p in sorted(gone) for offset in (2, 3)]
    assert {record.generation for record in again} == {2}


async def test_closing_while_a_revoke_waits_ends_the_wait(
    group: Group, revoke_begins: trio.Event
) -> None:
    group.fill(10, range(4))
    listener = Listener()
    async with AsyncExitStack() as stack:
        leaving = open_kafka_source(group.settings(drain_timeout_s=1000), observer=listener)
        async with leaving as source:
            await read(source, 40)
            joined = await stack.enter_async_context(open_kafka_source(group.settings()))
            with trio.fail_after(PATIENCE_S):
                await revoke_begins.wait()
        assert not listener.of(SourceTrouble)
        assert not any(event.drained for event in listener.of(PartitionsRevoked))
        assert sorted(places(await read(joined, 40))) == everything(10, range(4))


async def test_partitions_that_are_lost_are_never_committed(
    group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    group.fill(4)
    listener = Listener()
    settings = group.settings(options={"max.poll.interval.ms": 1000}, commit_interval_s=1000)
    async with open_kafka_source(settings, observer=listener) as source:
        records = await read(source, 4)
        account(source, records)
        lost = threading.Event()
        monkeypatch.setattr(pump.Pump, "_keep_house", lambda pump, now: lost.wait(1.5))
        await listener.hears(PartitionsLost)
        lost.set()
        monkeypatch.undo()
        assert source.statistics().max_poll_exceeded == 1
        again = await read(source, 4)
        assert {record.generation for record in again} == {2}
        await listener.hears(SourceRecovered)
    assert group.committed() == {}
    assert "max-poll-exceeded" in {event.kind for event in listener.of(SourceTrouble)}


# --------------------------------------------------------------------------------------------------------- troubles


async def test_a_log_that_was_made_anew_begins_a_new_generation(
    group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    group.fill(4)
    listener = Listener()
    async with open_kafka_source(group.settings(), observer=listener) as source:
        obey = pump.Pump._obey

        def seek_once(self: pump.Pump, command: Any) -> None:  # in the thread that owns the client
            monkeypatch.undo()
            self._consumer.seek(TopicPartition(group.topic, 0, 1))
            obey(self, command)

        await listener.hears(PartitionsAssigned)
        records = await read(source, 4)
        monkeypatch.setattr(pump.Pump, "_obey", seek_once)
        group.fill(1)
        more: list[Record] = []
        with trio.fail_after(PATIENCE_S):
            while not any((r.generation, r.offset) == (2, 4) for r in more):
                more += await source.poll()
        account(source, records)
        account(source, more)
    assert {record.generation for record in records} == {1}
    assert places(record for record in more if record.generation == 2) == [
        (0, n) for n in (1, 2, 3, 4)
    ]
    assert "goes back" in listener.of(SourceTrouble)[0].detail
    assert group.committed() == {0: 5}


async def test_a_committed_offset_beyond_the_log_is_loud_and_reading_begins_at_the_start(
    group: Group,
) -> None:
    group.fill(4)
    group.broker.commit(group.name, group.topic, 1000)
    listener = Listener()
    async with open_kafka_source(group.settings(), observer=listener) as source:
        assert places(await read(source, 4)) == everything(4)
        trouble = await listener.hears(SourceTrouble)
        await listener.hears(SourceRecovered)
    assert trouble.kind == "offset-reset"
    assert "1000" in trouble.detail


async def test_an_unknown_topic_is_said_and_found_when_it_appears(
    group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pump, "_PROBE_FIRST_S", 0.05)
    monkeypatch.setattr(pump, "_PROBE_EVERY_S", 0.05)
    group.fill(2)
    missing = group.broker.new_name("missing")
    listener = Listener()
    settings = group.settings(topics=(missing, group.topic))
    async with open_kafka_source(settings, observer=listener) as source:
        trouble = await listener.hears(SourceTrouble)
        assert (trouble.kind, missing in trouble.detail) == ("unknown-topic", True)
        await read(source, 2)  # the other topic is read meanwhile
        assert not listener.of(SourceRecovered)
        group.broker.create_topic(missing)
        await listener.hears(SourceRecovered)


async def test_a_broker_that_refuses_us_is_a_trouble_of_its_own(group: Group) -> None:
    listener = Listener()
    secret = {
        "security.protocol": "sasl_plaintext",
        "sasl.mechanisms": "PLAIN",
        "sasl.username": "u",
        "sasl.password": "p",
    }
    async with open_kafka_source(group.settings(options=secret), observer=listener):
        await listener.hears(SourceTrouble, lambda event: event.kind == "authentication")


async def test_a_broker_that_is_away_at_the_start_is_waited_for(
    group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pump, "_PROBE_EVERY_S", 0.1)
    group.fill(3)
    port = free_port()
    listener = Listener()
    settings = group.settings(bootstrap_servers=f"127.0.0.1:{port}")
    async with open_kafka_source(settings, observer=listener) as source:
        trouble = await listener.hears(SourceTrouble)
        assert (trouble.kind, f"127.0.0.1:{port}" in trouble.detail) == ("connection", True)
        async with open_forwarder(port, group.broker.bootstrap_servers):
            assert places(await read(source, 3)) == everything(3)
            await listener.hears(SourceRecovered)
    assert {event.kind for event in listener.of(SourceTrouble)} == {"connection", "no-broker"}


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


async def test_with_no_broker_at_all_closing_is_no_trouble(group: Group) -> None:
    listener = Listener()
    settings = group.settings(bootstrap_servers=f"127.0.0.1:{free_port()}")
    async with open_kafka_source(settings, observer=listener) as source:
        await listener.hears(SourceTrouble)
        with trio.move_on_after(0) as scope:
            await source.poll()
        assert scope.cancelled_caught
    assert "close" not in {event.kind for event in listener.of(SourceTrouble)}


async def test_a_broker_that_dies_is_said_and_closing_does_not_hang() -> None:
    listener = Listener()
    with run_kafka_broker() as broker:
        group = Group(broker)
        group.fill(3)
        settings = group.settings(close_timeout_s=PATIENCE_S)
        async with open_kafka_source(settings, observer=listener) as source:
            records = await read(source, 3)
            broker.kill()
            await listener.hears(SourceTrouble, lambda event: event.kind == "no-broker")
            account(source, records)
    assert "close" not in {event.kind for event in listener.of(SourceTrouble)}


async def test_a_broker_that_hangs_for_a_while_gets_the_commit_afterwards() -> None:
    listener = Listener()
    with run_kafka_broker() as broker:
        group = Group(broker)
        group.fill(3)
        async with open_kafka_source(group.settings(), observer=listener) as source:
            records = await read(source, 3)
            broker.stop()
            account(source, records)
            with trio.move_on_after(0.5) as scope:
                await source.poll()
            assert scope.cancelled_caught
            broker.go_on()
            await listener.hears(OffsetsCommitted)
            group.fill(1)
            await read(source, 1)
        assert group.committed() == {0: 3}


def test_a_client_that_hangs_is_left_behind_and_ends_by_itself_later() -> None:
    listener = Listener()

    async def main() -> None:
        async with open_kafka_source(
            group.settings(close_timeout_s=0.5), observer=listener
        ) as source:
            records = await read(source, 3)
            broker.stop()
            account(source, records)

    with run_kafka_broker() as broker:
        group = Group(broker)
        group.fill(3)
        trio.run(main)
        assert [event.kind for event in listener.of(SourceTrouble)] == ["close"]
        threads = list(pump_threads())
        assert threads
        broker.go_on()
        for thread in threads:
            thread.join(PATIENCE_S)
            assert not thread.is_alive()


async def test_a_fatal_error_of_the_client_ends_polling_with_its_words(group: Group) -> None:
    group.fill(2)
    async with open_kafka_source(group.settings()) as source:
        await read(source, 2)
        error: Any = KafkaError
        source._pump._on_error(error(KafkaError.FENCED_INSTANCE_ID, "two of one name", True))
        for _ in range(2):
            with pytest.raises(SourceError, match=r"two of one name.*FENCED_INSTANCE_ID"):
                await source.poll()


async def test_a_bug_in_the_thread_reaches_whoever_polls(
    group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_kafka_source(group.settings()) as source:
        monkeypatch.setattr(pump.Pump, "_keep_house", lambda pump, now: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            await source.poll()


@attrs.define
class Faulty:
    """An observer with a bug."""

    detailed: bool = False

    def observe(self, event: Event, /) -> None:
        raise LookupError(event)


async def test_an_error_of_the_observer_is_raised_by_the_next_poll(group: Group) -> None:
    with trio.fail_after(PATIENCE_S):
        async with open_kafka_source(group.settings(), observer=Faulty()) as source:
            with pytest.raises(LookupError):
                await source.poll()


async def test_an_error_of_the_observer_that_no_poll_saw_is_raised_at_the_end(group: Group) -> None:
    listener = Listener()

    @attrs.define
    class FaultyLater:
        detailed: bool = False

        def observe(self, event: Event, /) -> None:
            listener.observe(event)
            raise LookupError(event)

    with pytest.raises(LookupError):
        async with open_kafka_source(group.settings(), observer=FaultyLater()):
            await listener.hears(PartitionsAssigned)


# -------------------------------------------------------------------------------------------------- classic groups


@pytest.mark.slow
async def test_an_eager_group_shares_its_partitions_and_loses_nothing(group: Group) -> None:
    group.fill(5, range(4))
    listener = Listener()
    settings = group.settings(
        group_protocol="classic",
        assignor="range",
        session_timeout_s=6,
        options={"heartbeat.interval.ms": 200},
    )
    async with open_kafka_source(settings, observer=listener) as source:
        records = await read(source, 20)
        account(source, records)
        async with open_kafka_source(settings) as joined:
            revoked = await listener.hears(PartitionsRevoked)
            assert (len(revoked.partitions), revoked.drained) == (4, True), listener.events
            assert group.committed() == dict.fromkeys(range(4), 5)
            await listener.hears(PartitionsAssigned, lambda event: len(event.partitions) == 2)
            group.fill(1, range(4))
            ours, theirs = await read(source, 2), await read(joined, 2)
    assert sorted(places([*ours, *theirs])) == [(partition, 5) for partition in range(4)]
    assert {record.generation for record in ours} == {2}


CHILD = """
import sys, trio
from stationmaster.batch import OffsetRange
from stationmaster.events import OffsetsCommitted
from stationmaster.kafka import KafkaSettings, open_kafka_source

class Teller:
    detailed = False

    def observe(self, event):
        if isinstance(event, OffsetsCommitted):
            print("committed", event.offsets[0].last, flush=True)

async def main(servers, group, topic):
    settings = KafkaSettings(bootstrap_servers=servers, group_id=group, topics=(topic,), assignor="range",
                             session_timeout_s=6, commit_interval_s=0.05)
    async with open_kafka_source(settings, observer=Teller()) as source:
        seen = 0
        while True:
            for r in await source.poll():
                seen += 1
                if seen <= 30:
                    source.account(OffsetRange(topic=r.topic, partition=r.partition, first=r.offset, last=r.offset,
                                               generation=r.generation))
                print("seen", r.offset, flush=True)

trio.run(main, *sys.argv[1:])
"""


@pytest.mark.slow
async def test_after_a_kill_the_next_member_begins_where_the_commits_ended(group: Group) -> None:
    group.fill(50)
    child = [sys.executable, "-c", CHILD, group.broker.bootstrap_servers, group.name, group.topic]
    process = await trio.lowlevel.open_process(child, stdout=subprocess.PIPE)
    assert process.stdout is not None
    async with process.stdout:
        said = b""
        with trio.fail_after(PATIENCE_S):
            while not (b"seen 49\n" in said and b"committed 29\n" in said):
                said += await process.stdout.receive_some()
        process.send_signal(signal.SIGKILL)
        await process.wait()
    settings = group.settings(group_protocol="classic", assignor="range", session_timeout_s=6)
    async with open_kafka_source(settings) as source:
        records = await read(source, 20)
    assert places(records) == [(0, offset) for offset in range(30, 50)]
