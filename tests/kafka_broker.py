"""librdkafka's mock cluster as a process of its own, for the tests of the Kafka client."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import attrs
from confluent_kafka import Consumer, Producer, TopicPartition

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_ANSWER_S = 10.0


@attrs.define(eq=False)
class KafkaBroker:
    """A running broker, and what the other clients of a topic would do. Blocks: some ms a call."""

    process: subprocess.Popen[bytes]
    bootstrap_servers: str
    _producer: Producer
    _numbers: itertools.count[int] = attrs.field(factory=itertools.count)

    def new_name(self, what: str) -> str:
        """Return a name that nobody else uses on this broker."""
        return f"{what}-{next(self._numbers)}"

    def create_topic(self, topic: str | None = None) -> str:
        """Create a topic of 4 partitions."""
        topic = topic or self.new_name("topic")
        self._producer.list_topics(topic, timeout=_ANSWER_S)
        return topic

    def produce(
        self,
        topic: str,
        values: Sequence[bytes | None],
        *,
        partition: int = 0,
        timestamp_ms: int = 0,
        headers: Sequence[tuple[str, bytes | None]] = (),
    ) -> None:
        """Append the values to a partition, in order, and wait until they are there."""
        more: dict[str, Any] = {"timestamp": timestamp_ms, "headers": list(headers)}
        for value in values:
            self._producer.produce(topic, value, partition=partition, **more)
        assert self._producer.flush(_ANSWER_S) == 0

    def committed(self, group: str, topic: str) -> dict[int, int]:
        """Return the group's committed offset of every partition that has one."""
        with self._member(group) as consumer:
            found = consumer.committed(
                [TopicPartition(topic, n) for n in range(4)], timeout=_ANSWER_S
            )
        return {each.partition: each.offset for each in found if each.offset >= 0}

    def commit(self, group: str, topic: str, offset: int, *, partition: int = 0) -> None:
        """Commit an offset for a group that has no members."""
        with self._member(group) as consumer:
            consumer.commit(offsets=[TopicPartition(topic, partition, offset)], asynchronous=False)

    def stop(self) -> None:
        """Let it hang: connections stay open and nobody answers."""
        os.kill(self.process.pid, signal.SIGSTOP)
        # Not before all its threads stand still: on a busy machine they answer for a moment.
        os.waitid(os.P_PID, self.process.pid, os.WSTOPPED | os.WNOWAIT)

    def go_on(self) -> None:
        """End the hanging."""
        os.kill(self.process.pid, signal.SIGCONT)

    def kill(self) -> None:
        """End it: connections break."""
        self.process.kill()
        self.process.wait()

    @contextmanager
    def _member(self, group: str) -> Iterator[Consumer]:
        consumer = Consumer(
            {"bootstrap.servers": self.bootstrap_servers, "group.id": group, "log_level": 0}
        )
        try:
            yield consumer
        finally:
            consumer.close()


@contextmanager
def run_kafka_broker() -> Iterator[KafkaBroker]:
    """Run a broker until the block ends."""
    with subprocess.Popen(
        [sys.executable, "-m", "stationmaster.service.broker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        try:
            assert process.stdout is not None
            ready = json.loads(process.stdout.readline())
            servers = ready["bootstrapServers"]
            producer = Producer({"bootstrap.servers": servers, "log_level": 0, "linger.ms": 0})
            yield KafkaBroker(process, servers, producer)
        finally:
            process.send_signal(signal.SIGCONT)  # a test may have left it hanging
            process.kill()
