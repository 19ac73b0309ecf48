"""The demo's producer: replays the packaged station data to a topic, evenly over some seconds.

Prints a line of JSON now and then, and a last one: `{"produced": 200, "partitions": {"0": 50, ...}}` (messages that
the broker acknowledged, by partition).
"""

from __future__ import annotations

import gzip
import json
import sys
import time
from collections import Counter
from importlib.resources import files
from itertools import cycle, islice
from typing import TYPE_CHECKING

import click
from confluent_kafka import KafkaError, Message, Producer

from stationmaster.service.children import end_with_parent

if TYPE_CHECKING:
    from collections.abc import Iterator

_FLUSH_S = 30.0
_TOLD_EVERY_S = 1.0


def read_packaged_messages() -> list[bytes]:
    """Return the packaged slice of beijing12: one message value per hour (see data/ATTRIBUTION.md)."""
    packed = files("stationmaster.service").joinpath("data", "beijing12.jsonl.gz").read_bytes()
    return gzip.decompress(packed).splitlines()


@click.command()
@click.option("--bootstrap-servers", required=True)
@click.option("--topic", required=True)
@click.option("--partitions", type=click.IntRange(min=1), required=True)
@click.option("--messages", type=click.IntRange(min=1), required=True)
@click.option("--seconds", type=click.FloatRange(min=0), required=True)
def main(
    bootstrap_servers: str, topic: str, partitions: int, messages: int, seconds: float
) -> None:
    """Produce MESSAGES messages to TOPIC within SECONDS seconds."""
    end_with_parent()
    producer = Producer(
        {"bootstrap.servers": bootstrap_servers, "acks": "all", "linger.ms": 5, "log_level": 0}
    )
    acknowledged: Counter[int] = Counter()

    def on_delivery(error: KafkaError | None, message: Message) -> None:
        if error is not None:
            sys.exit(f"producer: not delivered: {error}")
        acknowledged[message.partition() or 0] += 1

    started = told = time.monotonic()
    values: Iterator[bytes] = islice(cycle(read_packaged_messages()), messages)
    for index, value in enumerate(values):
        due = started + seconds * index / messages
        while (wait := due - time.monotonic()) > 0:
            producer.poll(wait)
        producer.produce(topic, value, partition=index % partitions, on_delivery=on_delivery)
        if time.monotonic() - told >= _TOLD_EVERY_S:
            told = time.monotonic()
            click.echo(json.dumps({"produced": acknowledged.total()}))
    if missing := producer.flush(_FLUSH_S):
        sys.exit(f"producer: {missing} messages were not acknowledged within {_FLUSH_S:g} s")
    by_partition = {str(partition): count for partition, count in sorted(acknowledged.items())}
    click.echo(json.dumps({"produced": acknowledged.total(), "partitions": by_partition}))


if __name__ == "__main__":
    main()
