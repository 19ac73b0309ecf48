"""What lies in a topic."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from confluent_kafka import OFFSET_BEGINNING, Consumer, Message, TopicPartition

if TYPE_CHECKING:
    from tests.kafka_broker import KafkaBroker

_PATIENCE_S = 30.0


def read_topic(broker: KafkaBroker, topic: str) -> list[Message]:
    """Return all records of a topic of 4 partitions, in order within each. Blocks."""
    consumer = Consumer(
        {
            "bootstrap.servers": broker.bootstrap_servers,
            "group.id": "reader",
            "enable.auto.commit": False,
            "fetch.wait.max.ms": 20,
            "log_level": 0,
        }
    )
    try:
        partitions = [TopicPartition(topic, number, OFFSET_BEGINNING) for number in range(4)]
        ends = [consumer.get_watermark_offsets(each, timeout=_PATIENCE_S) for each in partitions]
        total = sum(high - low for low, high in ends)
        consumer.assign(partitions)
        found: list[Message] = []
        deadline = time.monotonic() + _PATIENCE_S
        while len(found) < total and time.monotonic() < deadline:
            if (message := consumer.poll(1.0)) is not None:
                found.append(message)
        assert len(found) == total, f"{len(found)} of {total} records in {topic}"
        return found
    finally:
        consumer.close()
