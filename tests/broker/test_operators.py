"""What operators rely on, by real processes on a real broker: dead letters on a topic, and TLS and SASL by file."""

from __future__ import annotations

import json
import random
import signal
from contextlib import asynccontextmanager, closing
from typing import TYPE_CHECKING, Any

from confluent_kafka import Consumer, TopicPartition

from tests.broker.cluster import PASSWORD, USER
from tests.broker.groups import Group, eventually
from tests.processes import kafka_config, open_part, open_receiver, wait_until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from tests.broker.cluster import Broker
    from tests.processes import Part, Receiver

MEMBERSHIP = 'group_protocol = "consumer"\ncommit_interval_s = 0.1'
GOOD = json.dumps({"stationData": [{"stationId": "S001", "x": 1}]}).encode()


@asynccontextmanager
async def open_service(
    folder: Path, group: Group, receiver: Receiver, *, address: str, kafka: str = "", dead: str = ""
) -> AsyncIterator[Part]:
    """Run the service for this group; `kafka` are more lines of that table, `dead` names a topic for dead letters."""
    config = kafka_config(
        folder,
        broker=address,
        topic=group.topic,
        receiver=receiver.url,
        handler="tests.service.handlers:brief",
        membership=f"{MEMBERSHIP}\n{kafka}",
        extra=f'[dead_letters]\nkind = "kafka"\ntopic = "{dead}"\n' if dead else "",
    )
    name = f"kafka.group_id={group.name}"
    async with open_part("run", "--config", str(config), "--set", name) as part:
        yield part


def offsets(receiver: Receiver) -> list[int]:
    """Return the offsets of the batches that the receiver holds (of topics with one partition)."""
    return sorted(report["ranges"][0]["first"] for report in receiver.batches().values())


def read(broker: Broker, topic: str) -> list[Any]:
    """Return all messages of a topic with one partition."""
    end = broker.end_offsets(topic)[0]
    asked = {"bootstrap.servers": broker.bootstrap, "group.id": "reader", "log_level": 0}
    found: list[Any] = []
    with closing(Consumer(asked)) as consumer:
        consumer.assign([TopicPartition(topic, 0, 0)])
        while len(found) < end:
            found += consumer.consume(end - len(found), timeout=5)
    return found


def our_headers(message: Any) -> dict[str, str]:
    return {name: value.decode() for name, value in message.headers()}


async def test_an_offset_counts_only_when_its_dead_letter_is_on_the_topic_and_nothing_else_waits_for_it(
    broker: Broker, tmp_path: Path
) -> None:
    group = Group(broker, partitions=1)
    dead = broker.new_name("dead")
    broker.produce(group.topic, [GOOD])
    broker.produce(
        group.topic, [b"{no json", None], timestamp_ms=1_700_000_000_000, headers=[("trace", b"7")]
    )
    broker.produce(group.topic, [GOOD])
    async with (
        open_receiver(tmp_path) as receiver,
        open_service(tmp_path, group, receiver, address=broker.bootstrap, dead=dead) as service,
    ):
        blocked = json.loads(await service.wait_line("store takes nothing"))
        assert (blocked["store"], blocked["kind"]) == ("dead-letters", "broker")
        assert f"the topic {dead} for dead letters does not exist" in blocked["detail"]
        await wait_until(lambda: offsets(receiver) == [0, 3])
        await group.until_committed({0: 1})
        broker.create_topic(dead, 1)
        await service.wait_line("store works again")
        await group.until_committed({0: 4})
        no_json, tombstone = read(broker, dead)
        assert no_json.value() == b"{no json"
        assert no_json.key() == f"{group.topic}/0/1/1700000000000".encode()
        told = our_headers(no_json)
        assert told.pop("stationmaster-detail")
        assert told == {
            "trace": "7",
            "stationmaster-reason": "not-json",
            "stationmaster-topic": group.topic,
            "stationmaster-partition": "0",
            "stationmaster-offset": "1",
            "stationmaster-timestamp": "1700000000000",
        }
        assert tombstone.value() == b""
        assert our_headers(tombstone)["stationmaster-reason"] == "empty-value"
        assert our_headers(tombstone)["stationmaster-tombstone"] == "true"
        service.process.terminate()
        assert await service.ends() == 0


async def test_a_letter_too_large_for_its_topic_is_there_in_pieces_that_make_it_whole(
    broker: Broker, tmp_path: Path
) -> None:
    group = Group(broker, partitions=1)
    dead = broker.create_topic(partitions=1, config={"max.message.bytes": "20000"})
    poison = random.Random(5).randbytes(100_000)
    broker.produce(group.topic, [GOOD, poison, b"[]", GOOD], headers=[("trace", b"7")])
    async with (
        open_receiver(tmp_path) as receiver,
        open_service(tmp_path, group, receiver, address=broker.bootstrap, dead=dead) as service,
    ):
        await group.until_committed({0: 4})
        assert offsets(receiver) == [0, 3]
        service.process.send_signal(signal.SIGINT)
        assert await service.ends() == 0
    letters = read(broker, dead)
    pieces = [each for each in letters if "stationmaster-piece" in our_headers(each)]
    (small,) = [each for each in letters if each not in pieces]
    assert small.value() == b"[]"
    assert b"".join(each.value() for each in pieces) == poison
    count = len(pieces)
    assert [our_headers(each)["stationmaster-piece"] for each in pieces] == [
        f"{number}/{count}" for number in range(1, count + 1)
    ]
    assert [each.key().partition(b"#")[2].decode() for each in pieces] == [
        our_headers(each)["stationmaster-piece"] for each in pieces
    ]
    assert {our_headers(each)["trace"] for each in pieces} == {"7"}
    assert not service.events("store takes nothing: consumption pauses until it does")


def is_busy(trouble: dict[str, Any]) -> bool:
    """Whether this only says that the broker took longer than half a second with a question."""
    return bool(
        trouble["kind"] == "connection" and trouble["detail"].startswith("Failed to get metadata:")
    )


def login(folder: Path, broker: Broker, password: str) -> str:
    file = folder / "password"
    file.write_text(f"{password}\n")
    return f"""
security_protocol = "sasl_ssl"
sasl_mechanism = "SCRAM-SHA-512"
username = "{USER}"
password_file = "{file}"
ca_file = "{broker.certificates.authority}"
"""


async def test_a_configuration_file_with_tls_and_a_password_file_reads_uploads_commits_and_keeps_letters(
    broker: Broker, tmp_path: Path
) -> None:
    group = Group(broker, partitions=1)
    dead = broker.create_topic(partitions=1)
    broker.produce(group.topic, [GOOD, b"{no json", GOOD])
    kafka = login(tmp_path, broker, PASSWORD)
    async with (
        open_receiver(tmp_path) as receiver,
        open_service(
            tmp_path, group, receiver, address=broker.sasl_tls, kafka=kafka, dead=dead
        ) as service,
    ):
        await group.until_committed({0: 3})
        assert offsets(receiver) == [0, 2]
        service.process.terminate()
        assert await service.ends() == 0
    assert [each.value() for each in read(broker, dead)] == [b"{no json"]
    assert not [each for each in service.events("source trouble") if not is_busy(each)]


async def test_a_wrong_password_is_said_without_the_password_and_waited_out_until_the_end_is_asked_for(
    broker: Broker, tmp_path: Path
) -> None:
    group = Group(broker, partitions=1)
    broker.produce(group.topic, [GOOD])
    kafka = login(tmp_path, broker, "wr0ng-w0rd")
    async with (
        open_receiver(tmp_path) as receiver,
        open_service(tmp_path, group, receiver, address=broker.sasl_tls, kafka=kafka) as service,
    ):
        line = await service.wait_line("source trouble")
        await service.wait_line('"authentication"')
        assert json.loads(line)["level"] == "warning"
        service.process.terminate()
        assert await service.ends() == 0
        assert receiver.batches() == {}
    assert not [line for line in service.lines if "wr0ng-w0rd" in line]
    await eventually(lambda: group.committed() == {})
