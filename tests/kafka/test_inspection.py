"""What the inspector makes of answers that a healthy broker does not give: a client that is told what to say."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import attrs
import pytest
import trio
from confluent_kafka import KafkaError, KafkaException, TopicPartition

from stationmaster.events import SourceRecovered, SourceTrouble
from stationmaster.kafka import KafkaSettings, open_kafka_source
from stationmaster.kafka.assignment import Assignment, Holding
from stationmaster.kafka.inspection import Inspector
from stationmaster.kafka.troubles import Kind, Troubles
from tests.kafka.clients import PATIENCE_S, Group, Listener, everything, in_the_thread, places, read

if TYPE_CHECKING:
    from stationmaster.events import Event
    from stationmaster.kafka import pump

LIMIT_S = 6.0
TIMED_OUT = KafkaException(KafkaError(KafkaError._TIMED_OUT))


class NoLeader(TopicPartition):
    """An answer with an error: only the client can make one, so this one bears it by its own attribute."""

    error = KafkaError(KafkaError.LEADER_NOT_AVAILABLE)


@attrs.define(eq=False)
class Client:
    """Says what the test sets; an exception is raised."""

    watermarks: tuple[int, int] = (-1001, -1001)
    stands: Any = ()
    ends: Any = ()
    refuses_seek: bool = False
    asked: list[int] = attrs.field(factory=list)
    """Partitions in each question for ends."""
    sought: list[tuple[int, int]] = attrs.field(factory=list)

    def get_watermark_offsets(self, partition: TopicPartition, *, cached: bool) -> tuple[int, int]:
        assert cached
        return self.watermarks

    def committed(self, partitions: list[TopicPartition], *, timeout: float) -> Any:
        assert timeout <= 0.5
        return self._say(self.stands)

    def offsets_for_times(self, partitions: list[TopicPartition], *, timeout: float) -> Any:
        assert timeout <= 0.5
        self.asked.append(len(partitions))
        numbers = {each.partition for each in partitions}
        return [each for each in self._say(self.ends) if each.partition in numbers]

    def seek(self, partition: TopicPartition) -> None:
        self.sought.append((partition.partition, partition.offset))
        if self.refuses_seek:
            raise TIMED_OUT

    def _say(self, words: Any) -> Any:
        if isinstance(words, Exception):
            raise words
        return words


@attrs.define(eq=False)
class Bench:
    client: Client = attrs.field(factory=Client)
    said: list[Event] = attrs.field(factory=list)
    assignment: Assignment = attrs.field(factory=Assignment)
    troubles: Troubles = attrs.field(init=False)
    inspector: Inspector = attrs.field(init=False)
    now: float = 0.0

    def __attrs_post_init__(self) -> None:
        settings = KafkaSettings(
            bootstrap_servers="b", group_id="g", topics=("t",), progress_timeout_s=LIMIT_S
        )
        self.troubles = Troubles(self.said.append)
        client: Any = self.client
        self.inspector = Inspector(
            client,
            settings,
            self.assignment,
            self.troubles,
            lambda error: pytest.fail(error.str()),
            next_probe=float("inf"),
        )

    def hold(self, count: int) -> list[Holding]:
        holdings = [self.assignment.hold(("t", number)) for number in range(count)]
        self.inspector.assigned(holdings)
        return holdings

    def spend(self, seconds: float) -> None:
        for _ in range(int(seconds)):
            self.now += 1
            self.inspector.ask_standing()
            self.inspector.look(self.now, heard=True)


def test_a_coordinator_that_does_not_answer_is_asked_once_and_leaves_the_lag_unknown() -> None:
    bench = Bench(Client(watermarks=(0, 9), stands=TIMED_OUT))
    (holding,) = bench.hold(1)
    bench.spend(1)
    bench.client.stands = [TopicPartition("t", 0, 4)]
    bench.spend(1)
    assert (holding.high, holding.lag) == (9, None)
    assert not bench.said


def test_a_partition_of_which_the_coordinator_says_nothing_keeps_its_lag_unknown() -> None:
    bench = Bench(Client(watermarks=(0, 9), stands=[TopicPartition("t", 1, 4), NoLeader("t", 0)]))
    first, second = bench.hold(2)
    bench.spend(1)
    assert (first.lag, second.lag) == (None, 5)


def test_with_no_broker_nothing_is_asked() -> None:
    bench = Bench(Client(watermarks=(0, 9), stands=AssertionError(), ends=AssertionError()))
    bench.troubles.begin(Kind.NO_BROKER, "all are down")
    (holding,) = bench.hold(1)
    holding.position = 3
    bench.spend(5 * LIMIT_S)
    assert not bench.client.asked


def test_one_without_a_leader_does_not_hide_the_others() -> None:
    bench = Bench(Client(ends=TIMED_OUT))
    first, second = bench.hold(2)
    first.position = second.position = 3
    bench.spend(LIMIT_S + 1)
    assert bench.client.asked == [2]
    bench.spend(LIMIT_S)
    assert bench.client.asked == [2, 1]
    bench.client.ends = [NoLeader("t", 0), TopicPartition("t", 1, 5)]
    bench.spend(1)
    assert bench.client.asked == [2, 1, 1]
    bench.spend(2 * LIMIT_S)
    assert (first.high, second.high) == (None, 5)
    assert set(bench.client.sought) == {(1, 3)}


def test_a_seek_that_is_refused_is_tried_again_with_the_next_stall() -> None:
    ends = [TopicPartition("t", 0, 5)]
    bench = Bench(Client(watermarks=(0, 3), ends=ends, refuses_seek=True))
    (holding,) = bench.hold(1)
    holding.position = 3
    bench.spend(3 * LIMIT_S)
    assert bench.client.sought == [(0, 3), (0, 3)]
    assert bench.inspector.watchdog.stalls == 2
    (trouble,) = bench.said
    assert isinstance(trouble, SourceTrouble)
    assert (trouble.kind, "t [0] at offset 3" in trouble.detail) == ("stalled", True)
    holding.position = 4
    bench.spend(1)
    assert bench.said[1:] == [SourceRecovered()]


async def test_a_partition_that_delivers_nothing_is_said_and_goes_on_where_it_stood(
    group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    group.fill(3)
    listener = Listener()
    zero = [TopicPartition(group.topic, 0)]
    silent = threading.Event()

    def go_silent(pump: pump.Pump) -> None:
        pump._consumer.pause(zero)
        silent.set()

    def wake_up(pump: pump.Pump) -> None:
        pump._consumer.resume(zero)

    settings = group.settings(progress_timeout_s=0.6)
    async with open_kafka_source(settings, observer=listener) as source:
        await read(source, 3)
        in_the_thread(monkeypatch, go_silent)
        assert await trio.to_thread.run_sync(silent.wait, PATIENCE_S)
        group.fill(4)
        group.fill(2, [1])
        assert places(await read(source, 2)) == everything(2, [1])
        trouble = await listener.hears(SourceTrouble, lambda event: event.kind == "stalled")
        assert f"{group.topic} [0] at offset 3" in trouble.detail
        assert source.statistics().stalls >= 2
        in_the_thread(monkeypatch, wake_up)
        records = await read(source, 4)
        await listener.hears(SourceRecovered)
    assert places(records) == [(0, offset) for offset in range(3, 7)]
    assert {record.generation for record in records} == {1}
