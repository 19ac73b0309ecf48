"""`python -m stationmaster.service.broker`: a Kafka-protocol broker in a process of its own, for tests and the demo.

It is librdkafka's mock cluster: nothing to install and up in a quarter of a second, but a test tool. It keeps about
5 MB per partition and drops older records without a word; topics cannot be created by request (asking for one's
metadata creates it, with 4 partitions); classic groups take 3 s to join, KIP-848 groups 0.1 s; it cannot come back on
its port once it was killed. A real Kafka is the truth.
"""

from __future__ import annotations

import json
import sys

import click
from confluent_kafka import Producer

_ANSWER_S = 10.0


@click.command()
@click.option(
    "--brokers",
    default=1,
    show_default=True,
    type=click.IntRange(1),
    help="Brokers in the cluster.",
)
@click.option(
    "--topic", "topics", multiple=True, help="A topic to create, with 4 partitions; repeatable."
)
def main(brokers: int, topics: tuple[str, ...]) -> None:
    """Serve until standard input closes or SIGTERM comes.

    Prints one line, {"bootstrapServers": "host:port,..."}, when it can be used.
    """
    # The cluster lives inside this client, which demands an address and never uses it.
    cluster = Producer(
        {"bootstrap.servers": "127.0.0.1:1", "test.mock.num.brokers": brokers, "log_level": 0}
    )
    addresses = [
        f"{b.host}:{b.port}" for b in cluster.list_topics(timeout=_ANSWER_S).brokers.values()
    ]
    for topic in topics:
        cluster.list_topics(topic, timeout=_ANSWER_S)
    click.echo(json.dumps({"bootstrapServers": ",".join(addresses)}))
    sys.stdout.flush()
    sys.stdin.buffer.read()


if __name__ == "__main__":
    main()
