"""The producer of what must not be lost, against librdkafka's mock cluster."""

from __future__ import annotations

import threading
from functools import partial
from typing import TYPE_CHECKING, Any

import attrs
import pytest
import trio
from confluent_kafka import KafkaError, KafkaException, Producer

from stationmaster.errors import ConfigError, StoreError
from stationmaster.kafka import KafkaSettings, producing
from stationmaster.kafka.deliveries import (
    ACKNOWLEDGED,
    Delivery,
    Fate,
    Outgoing,
    judge,
    producer_configuration,
)
from stationmaster.kafka.producing import open_producer
from tests.kafka.clients import PATIENCE_S, free_port
from tests.kafka.topics import read_topic
from tests.kafka_broker import run_kafka_broker

if TYPE_CHECKING:
    from tests.kafka_broker import KafkaBroker


def settings_for(servers: str, **more: Any) -> KafkaSettings:
    return KafkaSettings(bootstrap_servers=servers, group_id="g", topics=("t",), **more)


class _Fenced(Producer):
    """A client that met a fatal error."""

    def produce(self, *_: Any, **__: Any) -> None:  # type: ignore[explicit-override]  # 3.12 has override
        raise KafkaException(KafkaError(KafkaError._FATAL, "fenced"))


def _wait(event: threading.Event) -> None:
    event.wait(PATIENCE_S)


def fates(deliveries: tuple[Delivery, ...]) -> list[Fate]:
    return [each.fate for each in deliveries]


async def test_records_are_acknowledged_and_arrive_whole(kafka_broker: KafkaBroker) -> None:
    topic = kafka_broker.create_topic()
    records = [
        Outgoing(
            topic=topic,
            partition=2,
            key=b"k",
            value=b"one",
            headers=(("a", b"1"), ("none", None)),
            timestamp_ms=1_700_000_000_123,
        ),
        Outgoing(topic=topic, partition=2, value=None),
    ]

    async with open_producer(settings_for(kafka_broker.bootstrap_servers)) as producer:
        assert await producer.produce(records) == (ACKNOWLEDGED, ACKNOWLEDGED)
        assert await producer.produce([]) == ()

    first, second = read_topic(kafka_broker, topic)
    assert (first.partition(), first.key(), first.value()) == (2, b"k", b"one")
    assert first.headers() == [("a", b"1"), ("none", None)]
    assert (second.value(), second.key(), second.headers()) == (None, None, None)


async def test_several_tasks_get_their_own_answers(kafka_broker: KafkaBroker) -> None:
    topic = kafka_broker.create_topic()
    answers: dict[int, list[Fate]] = {}

    async with open_producer(settings_for(kafka_broker.bootstrap_servers)) as producer:

        async def send(number: int) -> None:
            partition = 99 if number % 2 else 0  # there are 4
            record = Outgoing(topic=topic, value=b"%d" % number, partition=partition)
            answers[number] = fates(await producer.produce([record] * 3))

        await producer.produce([Outgoing(topic=topic, value=b"first", partition=0)])
        async with trio.open_nursery() as nursery:
            for number in range(10):
                nursery.start_soon(send, number)

    assert answers == {
        number: [Fate.REFUSED if number % 2 else Fate.ACKNOWLEDGED] * 3 for number in range(10)
    }


async def test_partitions_are_counted_without_making_a_topic(kafka_broker: KafkaBroker) -> None:
    topic, missing = kafka_broker.create_topic(), kafka_broker.new_name("missing")

    async with open_producer(settings_for(kafka_broker.bootstrap_servers)) as producer:
        counts = await producer.count_partitions()
        again = await producer.count_partitions()

    assert counts[topic] == 4
    assert missing not in counts
    assert missing not in again


async def test_a_record_above_every_limit_is_too_large_and_its_neighbours_are_not(
    kafka_broker: KafkaBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    topic = kafka_broker.create_topic()
    settings = settings_for(kafka_broker.bootstrap_servers)
    monkeypatch.setattr("stationmaster.kafka.deliveries.LARGEST_BYTES", 10_000)
    records = [Outgoing(topic=topic, value=b"x" * size) for size in (10, 20_000, 10)]

    async with open_producer(settings) as producer:
        deliveries = await producer.produce(records)

    assert fates(deliveries) == [Fate.ACKNOWLEDGED, Fate.TOO_LARGE, Fate.ACKNOWLEDGED]


async def test_what_a_broker_refuses_for_its_size_is_sent_once_more_alone(
    kafka_broker: KafkaBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The mock cluster has no limit: the verdict on the batch is put in its mouth, the second sending is real.
    topic = kafka_broker.create_topic()
    verdicts = [Delivery(fate=Fate.TOO_LARGE)] * 3 + [Delivery(fate=Fate.TOO_LARGE)]

    def judge_as_told(error: KafkaError | None) -> Delivery:
        return verdicts.pop() if verdicts else judge(error)

    monkeypatch.setattr(producing, "judge", judge_as_told)
    records = [Outgoing(topic=topic, value=b"%d" % n, partition=0) for n in range(3)]

    async with open_producer(settings_for(kafka_broker.bootstrap_servers)) as producer:
        deliveries = await producer.produce(records)

    # All three in company, the first of them alone as well.
    assert fates(deliveries) == [Fate.TOO_LARGE, Fate.ACKNOWLEDGED, Fate.ACKNOWLEDGED]
    assert [m.value() for m in read_topic(kafka_broker, topic)] == [b"0", b"1", b"2"] * 2


async def test_a_full_queue_is_waited_for(kafka_broker: KafkaBroker) -> None:
    topic = kafka_broker.create_topic()
    settings = settings_for(
        kafka_broker.bootstrap_servers, options={"queue.buffering.max.messages": 2}
    )

    async with open_producer(settings) as producer:
        deliveries = await producer.produce([Outgoing(topic=topic, value=b"x")] * 50)

    assert deliveries == (ACKNOWLEDGED,) * 50


async def test_brokers_that_are_away_are_an_answer_that_says_why() -> None:
    settings = settings_for(f"127.0.0.1:{free_port()}")

    async with open_producer(settings, delivery_s=1.0) as producer:
        with trio.fail_after(PATIENCE_S):
            (delivery,) = await producer.produce([Outgoing(topic="t", value=b"x")])
            with pytest.raises(StoreError, match="does not tell its topics") as caught:
                await producer.count_partitions()

    assert delivery.fate is Fate.LATE
    assert "refused" in delivery.detail
    assert caught.value.kind == "broker"


async def test_a_broker_that_hangs_costs_a_bounded_time_even_when_cancelled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    take = producing._Post.take
    token, scope = trio.lowlevel.current_trio_token(), trio.CancelScope()

    def take_and_cancel(self: producing._Post, job: producing._Job) -> None:
        take(self, job)
        token.run_sync_soon(scope.cancel)  # in the middle of it

    with run_kafka_broker() as broker:
        topic = broker.create_topic()
        async with open_producer(
            settings_for(broker.bootstrap_servers), delivery_s=1.0
        ) as producer:
            await producer.produce([Outgoing(topic=topic, value=b"before")])
            broker.stop()
            monkeypatch.setattr(producing._Post, "take", take_and_cancel)
            with trio.fail_after(PATIENCE_S), scope:
                (delivery,) = await producer.produce([Outgoing(topic=topic, value=b"x")])

    assert scope.cancel_called
    assert delivery.fate is Fate.LATE


async def test_an_answer_that_never_comes_is_given_up(
    kafka_broker: KafkaBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(producing, "_MARGIN_S", 0.05)
    topic = kafka_broker.create_topic()
    async with open_producer(settings_for(kafka_broker.bootstrap_servers)) as producer:
        await producer.produce([Outgoing(topic=topic, value=b"x")])
        hang = threading.Event()
        producer._delivery_s = 0.05
        producer._post.commands.put(partial(_wait, hang))  # a client that does not come back
        try:
            deliveries = await producer.produce([Outgoing(topic=topic, value=b"x")] * 2)
            with pytest.raises(StoreError, match="hangs"):
                await producer.count_partitions()
        finally:
            hang.set()

    assert fates(deliveries) == [Fate.LATE, Fate.LATE]


async def test_a_client_that_hangs_at_the_end_is_left_behind(
    kafka_broker: KafkaBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(producing, "_CLOSE_S", 0.05)
    hang = threading.Event()
    async with open_producer(settings_for(kafka_broker.bootstrap_servers)) as producer:
        producer._post.commands.put(partial(_wait, hang))

    assert any(each.name == "stationmaster producer" for each in threading.enumerate())
    hang.set()


async def test_leaving_ends_the_thread_and_the_producer(kafka_broker: KafkaBroker) -> None:
    before = set(threading.enumerate())  # another test's client may hang still
    async with open_producer(settings_for(kafka_broker.bootstrap_servers)) as producer:
        new = set(threading.enumerate()) - before
        [thread] = [each for each in new if each.name == "stationmaster producer"]

    await trio.to_thread.run_sync(thread.join, PATIENCE_S)
    assert not thread.is_alive()
    with pytest.raises(trio.ClosedResourceError):
        await producer.produce([Outgoing(topic="t", value=b"x")])
    with pytest.raises(trio.ClosedResourceError):
        await producer.count_partitions()


async def test_after_a_fatal_error_a_new_client_takes_the_next_records(
    kafka_broker: KafkaBroker,
) -> None:
    topic = kafka_broker.create_topic()
    async with open_producer(settings_for(kafka_broker.bootstrap_servers)) as producer:
        post = producer._post
        old = post._client
        broken = threading.Event()

        def break_it() -> None:
            post._judge(KafkaError(KafkaError._FATAL, "fenced"))
            broken.set()

        post.commands.put(break_it)
        await trio.to_thread.run_sync(broken.wait, PATIENCE_S)
        assert await producer.produce([Outgoing(topic=topic, value=b"x")]) == (ACKNOWLEDGED,)

        assert post._client is not old


async def test_an_option_that_the_client_refuses_is_a_fault_of_configuration() -> None:
    settings = settings_for("127.0.0.1:9", options={"compression.type": "nonsense"})

    with pytest.raises(ConfigError, match=r"kafka\.options: "):
        async with open_producer(settings):
            pass


def test_the_producer_is_told_how_to_connect_and_nothing_about_reading() -> None:
    settings = settings_for(
        "a:1,b:2",
        instance_id="i",
        session_timeout_s=30.0,
        security_protocol="sasl_ssl",
        sasl_mechanism="PLAIN",
        username="u",
        password="p",
        options={
            "fetch.min.bytes": 5,
            "socket.keepalive.enable": True,
            "compression.type": "zstd",
            "acks": "0",
        },
    )

    configuration = producer_configuration(settings, delivery_s=3.0)

    assert configuration["bootstrap.servers"] == "a:1,b:2"
    assert configuration["socket.keepalive.enable"] is True
    assert configuration["compression.type"] == "zstd"
    assert configuration["security.protocol"] == "sasl_ssl"
    assert (configuration["sasl.username"], configuration["sasl.password"]) == ("u", "p")
    assert configuration["acks"] == "all"
    assert configuration["enable.idempotence"] is True
    assert configuration["message.timeout.ms"] == 3000
    consumers = ("group.", "auto.", "fetch.", "session.", "enable.auto", "partition.assignment")
    assert [key for key in configuration if key.startswith(consumers)] == []


@pytest.mark.parametrize(
    ("code", "fate"),
    [
        (KafkaError.MSG_SIZE_TOO_LARGE, Fate.TOO_LARGE),
        (KafkaError.RECORD_LIST_TOO_LARGE, Fate.TOO_LARGE),
        (KafkaError.TOPIC_AUTHORIZATION_FAILED, Fate.REFUSED),
        (KafkaError.INVALID_TIMESTAMP, Fate.REFUSED),
        (KafkaError._UNKNOWN_PARTITION, Fate.REFUSED),
        (KafkaError._MSG_TIMED_OUT, Fate.LATE),
        (KafkaError._FATAL, Fate.LATE),
        (KafkaError.NOT_ENOUGH_REPLICAS, Fate.LATE),
    ],
)
def test_errors_are_sorted_by_what_can_be_done_about_them(code: int, fate: Fate) -> None:
    delivery = judge(KafkaError(code, "why"))

    assert delivery == Delivery(fate=fate, detail="why")


async def test_a_new_client_that_cannot_be_made_is_tried_for_again_and_the_answers_say_so(
    kafka_broker: KafkaBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    topic = kafka_broker.create_topic()
    record = Outgoing(topic=topic, value=b"x")

    def make_none(_: dict[str, Any]) -> Producer:
        raise KafkaException(KafkaError(KafkaError._SSL, "no CA file"))

    monkeypatch.setattr(producing, "Producer", _Fenced)
    async with open_producer(settings_for(kafka_broker.bootstrap_servers)) as producer:
        monkeypatch.setattr(producing, "Producer", make_none)
        first, second = [(await producer.produce([record]))[0] for _ in range(2)]
        monkeypatch.setattr(producing, "Producer", Producer)  # the file is there again
        await producer.produce([record])  # by the old client, or by a new one already
        (last,) = await producer.produce([record])

    assert first == Delivery(fate=Fate.LATE, detail="fenced")
    assert second.fate is Fate.LATE
    assert second.detail.startswith("fenced (")
    assert "no CA file" in second.detail
    assert last == ACKNOWLEDGED


async def test_an_error_that_nobody_foresaw_answers_what_is_open_and_costs_no_more(
    kafka_broker: KafkaBroker,
) -> None:
    topic = kafka_broker.create_topic()
    record = Outgoing(topic=topic, value=b"x")
    senseless: Any = 5

    async with open_producer(settings_for(kafka_broker.bootstrap_servers)) as producer:
        deliveries = await producer.produce([attrs.evolve(record, key=senseless), record])
        again = await producer.produce([record])

    assert fates(deliveries) == [Fate.LATE, Fate.LATE]
    assert "TypeError" in deliveries[0].detail
    assert again == (ACKNOWLEDGED,)
