"""Reading, committing and going on, and records of every kind, from a real broker."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import trio
from confluent_kafka import KafkaError, KafkaException, Producer

from stationmaster.events import OffsetsCommitted, SourceRecovered
from tests.broker.groups import PATIENCE_S, Group, everything, places

if TYPE_CHECKING:
    from tests.broker.cluster import Broker


@pytest.fixture
def group(broker: Broker) -> Group:
    return Group(broker)


@pytest.mark.usefixtures("patient_questions")
async def test_everything_of_every_partition_is_read_once_and_in_order(group: Group) -> None:
    group.fill(1000)
    async with group.open_member() as member:
        await member.has_read(4000)
    for number in range(4):
        mine = [record for record in member.records if record.partition == number]
        assert [record.offset for record in mine] == list(range(1000))
        assert [record.value for record in mine] == [b"%d/%d" % (number, n) for n in range(1000)]
    assert group.committed() == dict.fromkeys(range(4), 1000)
    assert not member.troubles


async def test_only_the_contiguous_prefix_is_committed_and_the_next_member_begins_there(
    group: Group,
) -> None:
    group.fill(10)
    async with group.open_member(accounts=False) as member:
        await member.has_read(40)
        hole = [(0, 3), (2, 0)]
        member.account(r for r in member.records if (r.partition, r.offset) not in hole)
    assert group.committed() == {0: 3, 1: 10, 3: 10}
    async with group.open_member() as successor:
        await successor.has_read(17)
    assert places(successor) == [(0, n) for n in range(3, 10)] + [(2, n) for n in range(10)]
    assert group.committed() == dict.fromkeys(range(4), 10)


async def test_a_commit_goes_through_while_the_client_waits_for_records(group: Group) -> None:
    # From confluent-kafka 2.16 on a commit from another thread than the polling one would wait for ever.
    group.fill(3)
    async with group.open_member() as member:
        await member.has_read(12)
        await member.hears(OffsetsCommitted)
        await group.until_committed(dict.fromkeys(range(4), 3))


async def test_a_new_group_begins_at_the_start_of_the_log(group: Group) -> None:
    group.fill(5)
    async with group.open_member() as member:
        await member.has_read(20)
    assert places(member) == everything(range(4), 5)


async def test_a_new_group_begins_at_the_end_of_the_log_if_it_is_told_so(group: Group) -> None:
    group.fill(5)
    async with group.open_member(start="latest") as member:
        await group.until_shared(member)
        # When exactly it looks for the end nobody tells: records come until it has seen each partition.
        with trio.fail_after(PATIENCE_S):
            while {record.partition for record in member.records} != {0, 1, 2, 3}:
                group.fill(1)
                await trio.sleep(0.05)
    assert min(record.offset for record in member.records) >= 5


async def test_a_log_that_was_cut_beyond_the_committed_offset_is_told_and_read_from_what_is_left(
    group: Group, broker: Broker
) -> None:
    group.fill(10)
    async with group.open_member(accounts=False) as member:
        await member.has_read(40)
        member.account(record for record in member.records if record.offset < 2)
    broker.delete_records(group.topic, {1: 6})
    async with group.open_member() as successor:
        trouble = await successor.troubled("offset-reset")
        assert f"{group.topic} [1]" in trouble.detail
        await successor.has_read(3 * 8 + 4)
        await successor.hears(SourceRecovered)
    assert [place for place in places(successor) if place[0] == 1] == [(1, n) for n in range(6, 10)]
    assert group.committed() == dict.fromkeys(range(4), 10)


async def test_a_topic_that_was_deleted_and_made_anew_is_read_from_its_start(
    group: Group, broker: Broker
) -> None:
    group.fill(5)
    async with group.open_member(options={"topic.metadata.refresh.interval.ms": 500}) as member:
        await member.has_read(20)
        await group.until_committed(dict.fromkeys(range(4), 5))
        broker.delete_topic(group.topic)
        await member.troubled("unknown-topic")
        broker.create_topic(group.topic)
        group.fill(2)
        await member.has_read(28)
        await group.until_committed(dict.fromkeys(range(4), 2))
    again = member.records[20:]
    assert sorted((each.partition, each.offset) for each in again) == everything(range(4), 2)
    assert {each.generation for each in again} == {2}


async def test_partitions_that_a_topic_gets_later_are_read_from_their_start(
    broker: Broker,
) -> None:
    group = Group(broker, partitions=1)
    group.fill(2)
    async with group.open_member(options={"topic.metadata.refresh.interval.ms": 500}) as member:
        await member.has_read(2)
        broker.add_partitions(group.topic, 2)
        broker.produce(group.topic, [b"new"], partition=1)
        await member.has_read(3)
    assert places(member) == [(0, 0), (0, 1), (1, 0)]


# ---------------------------------------------------------------------------------------------------------- records


async def test_tombstones_empty_values_and_single_bytes_are_told_apart(
    group: Group, broker: Broker
) -> None:
    broker.produce(group.topic, [None, b"", b"\0", b"\xff"], timestamp_ms=1_700_000_000_123)
    async with group.open_member() as member:
        await member.has_read(4)
    assert [record.value for record in member.records] == [None, b"", b"\0", b"\xff"]
    assert {record.timestamp_ms for record in member.records} == {1_700_000_000_123}


async def test_headers_of_any_bytes_come_as_they_are(group: Group, broker: Broker) -> None:
    headers = [("kind", b"\xff\xfe\x00"), ("kind", None), ("größe", b"")]
    broker.produce(group.topic, [b"x"], headers=headers)
    async with group.open_member() as member:
        await member.has_read(1)
    assert list(member.records[0].headers) == headers


async def test_a_record_of_exactly_the_topics_limit_is_read(broker: Broker) -> None:
    limit = 200_000
    frame = 61 + 11  # a batch's head, and what stands around a value of this size
    topic = broker.create_topic(partitions=1, config={"max.message.bytes": str(limit)})
    largest = b"x" * (limit - frame)
    with pytest.raises(KafkaException) as refused:
        broker.produce(topic, [largest + b"x"])
    assert refused.value.args[0].code() == KafkaError.MSG_SIZE_TOO_LARGE
    broker.produce(topic, [largest])

    group = Group(broker)
    async with group.open_member(
        topics=(topic,), options={"fetch.message.max.bytes": 1000}
    ) as member:
        await member.has_read(1)
    assert member.records[0].value == largest


@pytest.mark.parametrize("codec", ["gzip", "snappy", "lz4", "zstd"])
async def test_compressed_batches_are_read(group: Group, broker: Broker, codec: str) -> None:
    values = [b"%d " % number * 50 for number in range(200)]
    produce(broker, group.topic, values, {"compression.type": codec, "linger.ms": 50})
    async with group.open_member() as member:
        await member.has_read(200)
    assert [record.value for record in member.records] == values


async def test_aborted_transactions_are_not_read_and_the_gaps_do_not_hold_up_the_commit(
    group: Group, broker: Broker
) -> None:
    producer = Producer(
        {"bootstrap.servers": broker.bootstrap, "transactional.id": broker.new_name("tx")}
    )
    producer.init_transactions(10)
    for number, end in enumerate((producer.commit_transaction, producer.abort_transaction) * 3):
        producer.begin_transaction()
        for _ in range(3):
            producer.produce(group.topic, b"%d" % number, partition=0)
        producer.flush(10)
        end(10)
    async with group.open_member() as member:
        await member.has_read(9)
        # Each transaction is three records and a marker: 0-2, 8-10 and 16-18 stand.
        await group.until_committed({0: 19})
    assert [record.offset for record in member.records] == [0, 1, 2, 8, 9, 10, 16, 17, 18]
    assert {record.value for record in member.records} == {b"0", b"2", b"4"}
    assert broker.end_offsets(group.topic)[0] == 24


def produce(broker: Broker, topic: str, values: list[bytes], settings: dict[str, Any]) -> None:
    producer = Producer({"bootstrap.servers": broker.bootstrap, **settings})
    for value in values:
        producer.produce(topic, value, partition=0)
    assert producer.flush(10) == 0
