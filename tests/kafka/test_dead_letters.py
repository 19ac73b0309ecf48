"""Dead letters on a Kafka topic, against librdkafka's mock cluster."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import attrs
import pytest
import trio
from confluent_kafka import Producer

from stationmaster.batch import DeadLetter
from stationmaster.errors import StoreError
from stationmaster.kafka import KafkaSettings, dead_letters, producing
from stationmaster.kafka.dead_letters import KafkaDeadLetters, open_kafka_dead_letters
from stationmaster.kafka.deliveries import Delivery, Fate, Outgoing
from stationmaster.kafka.producing import KafkaProducer
from tests.kafka.clients import PATIENCE_S, free_port
from tests.kafka.topics import read_topic

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from tests.kafka_broker import KafkaBroker


def letter(**more: Any) -> DeadLetter:
    some: dict[str, Any] = {
        "reason": "invalid-json",
        "detail": "line 1",
        "topic": "telemetry",
        "partition": 3,
        "offset": 77,
        "timestamp_ms": 1_700_000_000_123,
        "value": b"{",
    }
    return DeadLetter(**(some | more))


@asynccontextmanager
async def letters_in(broker: KafkaBroker, topic: str) -> AsyncIterator[KafkaDeadLetters]:
    settings = KafkaSettings(
        bootstrap_servers=broker.bootstrap_servers, group_id="g", topics=("telemetry",)
    )
    async with open_kafka_dead_letters(settings, topic=topic) as opened:
        yield opened


def refuse_above(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    """Let the topic refuse large records: the mock cluster has no limit; a real one counts headers, too."""
    produce = KafkaProducer.produce

    async def produce_if_small(
        self: KafkaProducer, records: Sequence[Outgoing]
    ) -> tuple[Delivery, ...]:
        def size(record: Outgoing) -> int:
            headers = sum(len(name) + len(value or b"") for name, value in record.headers)
            return len(record.value or b"") + len(record.key or b"") + headers

        taken = iter(await produce(self, [each for each in records if size(each) <= limit]))
        large = Delivery(fate=Fate.TOO_LARGE, detail="Broker: Message size too large")
        return tuple(next(taken) if size(each) <= limit else large for each in records)

    monkeypatch.setattr(KafkaProducer, "produce", produce_if_small)


async def test_a_letter_is_the_record_with_headers_that_say_why(kafka_broker: KafkaBroker) -> None:
    topic = kafka_broker.create_topic()
    headers = (("trace", b"abc"), ("none", None), ("stationmaster-reason", b"an older one"))

    async with letters_in(kafka_broker, topic) as opened:
        await opened.keep([letter(headers=headers)])

    (record,) = read_topic(kafka_broker, topic)
    assert record.key() == b"telemetry/3/77/1700000000123"
    assert record.value() == b"{"
    assert record.headers() == [
        ("trace", b"abc"),
        ("none", None),
        ("stationmaster-reason", b"invalid-json"),
        ("stationmaster-detail", b"line 1"),
        ("stationmaster-topic", b"telemetry"),
        ("stationmaster-partition", b"3"),
        ("stationmaster-offset", b"77"),
        ("stationmaster-timestamp", b"1700000000123"),
    ]


async def test_a_rejected_upload_names_its_batch(kafka_broker: KafkaBroker) -> None:
    topic = kafka_broker.create_topic()

    async with letters_in(kafka_broker, topic) as opened:
        await opened.keep([letter(reason="rejected-upload", batch_id="b-1", value=b"{}")])

    (record,) = read_topic(kafka_broker, topic)
    assert record.key() == b"telemetry/3/77/1700000000123/b-1"
    assert ("stationmaster-batch-id", b"b-1") in (record.headers() or [])


async def test_a_tombstone_does_not_delete_itself_in_a_compacted_topic(
    kafka_broker: KafkaBroker,
) -> None:
    topic = kafka_broker.create_topic()

    async with letters_in(kafka_broker, topic) as opened:
        await opened.keep([letter(value=None)])

    (record,) = read_topic(kafka_broker, topic)
    assert record.value() == b""
    assert ("stationmaster-tombstone", b"true") in (record.headers() or [])


async def test_words_that_are_no_unicode_are_escaped(kafka_broker: KafkaBroker) -> None:
    topic = kafka_broker.create_topic()

    async with letters_in(kafka_broker, topic) as opened:
        await opened.keep([letter(detail="lone \ud800")])

    (record,) = read_topic(kafka_broker, topic)
    assert ("stationmaster-detail", b"lone \\ud800") in (record.headers() or [])


async def test_a_letter_that_is_kept_again_has_the_same_key_and_comes_in_order(
    kafka_broker: KafkaBroker,
) -> None:
    topic = kafka_broker.create_topic()

    async with letters_in(kafka_broker, topic) as opened:
        await opened.keep([letter(offset=1), letter(offset=2)])
        await opened.keep([letter(offset=1), letter(offset=2)])
        await opened.keep([])

    keys = [record.key() for record in read_topic(kafka_broker, topic)]
    assert keys == [b"telemetry/3/1/1700000000123", b"telemetry/3/2/1700000000123"] * 2


async def test_a_missing_topic_is_named_and_found_when_somebody_made_it(
    kafka_broker: KafkaBroker,
) -> None:
    topic = kafka_broker.new_name("dead")

    async with letters_in(kafka_broker, topic) as opened:
        with pytest.raises(StoreError, match=f"{topic} for dead letters does not exist") as caught:
            await opened.keep([letter()])
        assert caught.value.kind == "broker"

        kafka_broker.create_topic(topic)
        await opened.keep([letter()])

    assert len(read_topic(kafka_broker, topic)) == 1


async def test_brokers_that_are_away_are_a_store_error() -> None:
    settings = KafkaSettings(
        bootstrap_servers=f"127.0.0.1:{free_port()}", group_id="g", topics=("t",)
    )
    async with open_kafka_dead_letters(settings, topic="dead", delivery_s=0.5) as opened:
        with trio.fail_after(PATIENCE_S), pytest.raises(StoreError) as caught:
            await opened.keep([letter()])

    assert caught.value.kind == "broker"


@pytest.mark.parametrize(
    ("fate", "advice"), [(Fate.LATE, "brokers and the network"), (Fate.REFUSED, "permissions")]
)
async def test_what_the_topic_does_not_take_is_a_store_error_with_advice(
    fate: Fate, advice: str, kafka_broker: KafkaBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(_: KafkaProducer, records: Sequence[Outgoing]) -> tuple[Delivery, ...]:
        await trio.lowlevel.checkpoint()
        return tuple(Delivery(fate=fate, detail="no") for _ in records)

    topic = kafka_broker.create_topic()
    async with letters_in(kafka_broker, topic) as opened:
        with monkeypatch.context() as patch:
            patch.setattr(KafkaProducer, "produce", refuse)
            with pytest.raises(StoreError, match=advice) as caught:
                await opened.keep([letter()])
        await opened.keep([letter()])

    assert caught.value.kind == "broker"


async def test_a_letter_too_large_for_the_topic_is_kept_in_pieces(
    kafka_broker: KafkaBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    topic = kafka_broker.create_topic()
    value = b"".join(b"%05d" % n for n in range(10_000))
    refuse_above(monkeypatch, 20_000)

    async with letters_in(kafka_broker, topic) as opened:
        await opened.keep([letter(offset=1), letter(offset=2, value=value), letter(offset=3)])

    records = read_topic(kafka_broker, topic)
    by_key = {record.key(): record for record in records}
    assert len(by_key) == len(records)
    assert by_key.keys() == {
        b"telemetry/3/1/1700000000123",
        b"telemetry/3/3/1700000000123",
        *(b"telemetry/3/2/1700000000123#%d/4" % n for n in range(1, 5)),
    }
    pieces = [by_key[b"telemetry/3/2/1700000000123#%d/4" % n] for n in range(1, 5)]
    assert b"".join(piece.value() or b"" for piece in pieces) == value
    assert all(("stationmaster-reason", b"invalid-json") in (p.headers() or []) for p in pieces)
    assert ("stationmaster-piece", b"2/4") in (pieces[1].headers() or [])


@pytest.mark.parametrize("value", [b"v" * 12_000, b"", None])
async def test_headers_too_large_for_the_topic_are_left_out_and_counted(
    value: bytes | None, kafka_broker: KafkaBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    topic = kafka_broker.create_topic()
    refuse_above(monkeypatch, 20_000)

    async with letters_in(kafka_broker, topic) as opened:
        await opened.keep([letter(value=value, headers=(("big", b"h" * 19_990), ("small", b"s")))])

    (record,) = read_topic(kafka_broker, topic)
    assert record.value() == (value or b"")
    headers = dict(record.headers() or [])
    assert headers["stationmaster-without-headers"] == b"2"
    assert not {"big", "small"} & headers.keys()


async def test_a_topic_without_room_for_anything_says_what_to_raise(
    kafka_broker: KafkaBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    topic = kafka_broker.create_topic()
    refuse_above(monkeypatch, 10)

    async with letters_in(kafka_broker, topic) as opened:
        with pytest.raises(StoreError, match=r"raise its `max\.message\.bytes`"):
            await opened.keep([letter(value=b"x" * 9_000)])


async def test_cancellation_waits_until_the_letters_are_there(kafka_broker: KafkaBroker) -> None:
    topic = kafka_broker.create_topic()

    async with letters_in(kafka_broker, topic) as opened:
        await opened.keep([letter(offset=1)])
        produce = opened._producer.produce
        with trio.CancelScope() as scope:

            async def cancel_first(records: Sequence[Outgoing]) -> tuple[Delivery, ...]:
                scope.cancel()
                return await produce(records)

            opened._producer = attrs.make_class("Stub", ["produce"])(cancel_first)
            await opened.keep([letter(offset=2)])
            returned = True

    assert returned
    assert len(read_topic(kafka_broker, topic)) == 2


async def test_keeping_that_takes_too_long_is_a_store_error(
    kafka_broker: KafkaBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def never(_: KafkaProducer, records: Sequence[Outgoing]) -> tuple[Delivery, ...]:
        await trio.sleep_forever()

    monkeypatch.setattr(KafkaProducer, "produce", never)
    monkeypatch.setattr(dead_letters, "_LONGEST_S", 0.01)
    async with letters_in(kafka_broker, kafka_broker.create_topic()) as opened:
        with pytest.raises(StoreError, match="did not take 1 dead letters within"):
            await opened.keep([letter()])


async def test_a_topic_without_partitions_is_not_there_yet(
    kafka_broker: KafkaBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    # So brokers list a topic that is just being created, or deleted; the mock cluster makes its own at once.
    topic = kafka_broker.create_topic()
    without_partitions = [topic]

    class Listing(Producer):
        def list_topics(self, *args: Any, **more: Any) -> Any:  # type: ignore[explicit-override]  # 3.12 has override
            told = super().list_topics(*args, **more)
            for name in without_partitions:
                told.topics[name].partitions.clear()
            return told

    monkeypatch.setattr(producing, "Producer", Listing)
    async with letters_in(kafka_broker, topic) as opened:
        with pytest.raises(StoreError, match=f"{topic} for dead letters does not exist"):
            await opened.keep([letter()])

        without_partitions.clear()
        await opened.keep([letter()])

    assert len(read_topic(kafka_broker, topic)) == 1
