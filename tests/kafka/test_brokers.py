"""Brokers that are away, hang, die or refuse, and errors that end the source."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING, Any

import attrs
import pytest
import trio
from confluent_kafka import KafkaError, TopicPartition

from stationmaster.errors import SourceError
from stationmaster.events import (
    OffsetsCommitted,
    PartitionsAssigned,
    SourceRecovered,
    SourceTrouble,
)
from stationmaster.kafka import inspection, open_kafka_source, pump
from tests.kafka_broker import run_kafka_broker

if TYPE_CHECKING:
    from stationmaster.events import Event

from tests.kafka.clients import (
    PATIENCE_S,
    Group,
    Listener,
    account,
    everything,
    free_port,
    in_the_thread,
    open_forwarder,
    places,
    pump_threads,
    read,
)


async def test_a_commit_that_is_refused_is_a_trouble_and_sent_again_until_it_is_taken(
    group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    strange = (group.topic, 99)
    gone = [TopicPartition(*strange)]

    def account_for_a_partition_that_does_not_exist(pump: pump.Pump) -> None:
        holding = pump._assignment.hold(strange)
        holding.begin = 0
        holding.lease.hand_out(0)
        holding.lease.account(0, 0)

    group.fill(1)
    listener = Listener()
    async with open_kafka_source(group.settings(), observer=listener) as source:
        records = await read(source, 1)
        in_the_thread(monkeypatch, account_for_a_partition_that_does_not_exist)
        trouble = await listener.hears(SourceTrouble, lambda event: event.kind == "commit")
        assert f"{group.topic} [99]" in trouble.detail
        account(source, records)  # this broker refuses a commit in whole
        in_the_thread(monkeypatch, lambda p: p._assignment.forget(p._assignment.find_all(gone)))
        await listener.hears(OffsetsCommitted)
        await listener.hears(SourceRecovered)
        assert source.statistics().commit_errors >= 1
    assert group.committed() == {0: 1}


async def test_a_committed_offset_beyond_the_log_is_loud_and_reading_begins_at_the_start(
    group: Group,
) -> None:
    group.fill(4)
    group.broker.commit(group.name, group.topic, 1000)
    listener = Listener()
    async with open_kafka_source(group.settings(), observer=listener) as source:
        assert places(await read(source, 4)) == everything(4)
        trouble = await listener.hears(SourceTrouble, lambda event: event.kind == "offset-reset")
        await listener.hears(SourceRecovered)
        assert source.statistics().offset_resets == 1
    assert "1000" in trouble.detail


@pytest.mark.usefixtures("patient_questions")
async def test_an_unknown_topic_is_said_and_found_when_it_appears(
    group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pump, "PROBE_FIRST_S", 0.05)
    monkeypatch.setattr(inspection, "PROBE_EVERY_S", 0.05)
    group.fill(2)
    missing = group.broker.new_name("missing")
    listener = Listener()
    settings = group.settings(topics=(missing, group.topic))
    async with open_kafka_source(settings, observer=listener) as source:
        trouble = await listener.hears(SourceTrouble, lambda event: event.kind == "unknown-topic")
        assert missing in trouble.detail
        await read(source, 2)  # the other topic is read meanwhile
        assert not listener.of(SourceRecovered)
        group.broker.create_topic(missing)
        await listener.hears(SourceRecovered)


async def test_a_broker_that_refuses_us_is_a_trouble_of_its_own(group: Group) -> None:
    listener = Listener()
    settings = group.settings(
        security_protocol="sasl_plaintext",
        sasl_mechanism="PLAIN",
        username="u",
        password="geheim",
    )
    async with open_kafka_source(settings, observer=listener):
        trouble = await listener.hears(SourceTrouble, lambda event: event.kind == "authentication")
    assert "geheim" not in trouble.detail


async def test_a_broker_that_is_away_at_the_start_is_waited_for(
    group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What is said is the client's own word, which has the address: a question would be said in its place.
    monkeypatch.setattr(pump, "PROBE_FIRST_S", PATIENCE_S)
    group.fill(3)
    port = free_port()
    listener = Listener()
    settings = group.settings(bootstrap_servers=f"127.0.0.1:{port}")
    async with open_kafka_source(settings, observer=listener) as source:
        trouble = await listener.hears(SourceTrouble, lambda event: event.kind == "connection")
        assert f"127.0.0.1:{port}" in trouble.detail
        async with open_forwarder(port, group.broker.bootstrap_servers):
            assert places(await read(source, 3)) == everything(3)
            await listener.hears(SourceRecovered)
    assert {event.kind for event in listener.of(SourceTrouble)} == {"connection", "no-broker"}


async def test_with_no_broker_at_all_closing_is_no_trouble(
    group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pump, "PROBE_FIRST_S", 0.0)
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


@pytest.mark.usefixtures("patient_questions")
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


async def test_an_answer_to_a_commit_that_nobody_waits_for_is_ignored(group: Group) -> None:
    listener = Listener()
    async with open_kafka_source(group.settings(), observer=listener) as source:
        source._pump.committer.answered(None, [TopicPartition(group.topic, 0, 5)])
        group.fill(1)
        await read(source, 1)
    assert not listener.of(OffsetsCommitted)


async def test_a_fatal_error_of_the_client_ends_polling_with_its_words(group: Group) -> None:
    group.fill(2)
    async with open_kafka_source(group.settings()) as source:
        await read(source, 2)
        error: Any = KafkaError
        source._pump._on_error(error(KafkaError.FENCED_INSTANCE_ID, "two of one name", True))
        for _ in range(2):
            with pytest.raises(SourceError, match=r"two of one name.*FENCED_INSTANCE_ID"):
                await source.poll()


@pytest.mark.parametrize("is_named", [True, False])
@pytest.mark.parametrize("code", [KafkaError.FENCED_INSTANCE_ID, KafkaError.UNRELEASED_INSTANCE_ID])
async def test_two_members_of_one_instance_id_end_the_source_with_the_way_out(
    group: Group, monkeypatch: pytest.MonkeyPatch, code: int, is_named: bool
) -> None:
    error: Any = KafkaError
    fatal = error(code, "fenced", True)
    if not is_named:  # so it comes from a real broker
        fatal = error(KafkaError._FATAL, f"Fatal error: {KafkaError(code).str()}")
    async with open_kafka_source(group.settings(instance_id="north-1")) as source:
        in_the_thread(monkeypatch, lambda p: p._on_error(fatal))
        with pytest.raises(SourceError, match=r"'north-1'.* instance_id of its own, or none"):
            await source.poll()


async def test_a_fatal_error_that_comes_in_place_of_a_message_is_one_as_well(
    group: Group,
) -> None:
    error: Any = KafkaError
    async with open_kafka_source(group.settings()) as source:
        source._pump._on_error(error(KafkaError._FATAL, "no way on"))
        with pytest.raises(SourceError, match="no way on"):
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


@pytest.mark.slow
def test_a_process_whose_client_hangs_still_exits() -> None:
    code = """
import sys, trio
from stationmaster.kafka import KafkaSettings, open_kafka_source

async def main(servers, topic):
    settings = KafkaSettings(bootstrap_servers=servers, group_id="g", topics=(topic,), group_protocol="consumer",
                             close_timeout_s=0.5)
    async with open_kafka_source(settings) as source:
        await source.poll()
        print("ready", flush=True)
        await trio.to_thread.run_sync(sys.stdin.readline)

trio.run(main, *sys.argv[1:])
"""
    with run_kafka_broker() as broker:
        group = Group(broker)
        group.fill(1)
        child = [sys.executable, "-c", code, broker.bootstrap_servers, group.topic]
        with subprocess.Popen(child, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            broker.stop()
            process.communicate(b"\n", timeout=PATIENCE_S)
            assert process.returncode == 0
