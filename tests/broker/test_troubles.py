"""Topics that are missing or closed, wrong credentials, and brokers that die, hang, are far away or slow."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import trio

from stationmaster.events import (
    OffsetsCommitted,
    PartitionsLost,
    SourceRecovered,
    SourceTrouble,
)
from tests.broker.cluster import PASSWORD, USER
from tests.broker.groups import Group, everything, places

if TYPE_CHECKING:
    from tests.broker.cluster import Broker

COOPERATIVE: dict[str, Any] = {"assignor": "cooperative-sticky"}
KIP_848: dict[str, Any] = {"group_protocol": "consumer"}
PROTOCOLS = pytest.mark.parametrize(
    "kind", [COOPERATIVE, KIP_848], ids=["cooperative-sticky", "KIP-848"]
)


@PROTOCOLS
async def test_a_missing_topic_is_told_and_found_within_30_s_of_being_made(
    broker: Broker, kind: dict[str, Any]
) -> None:
    group = Group(broker, defaults=kind)
    late = broker.new_name("late")
    async with group.open_member(topics=(late,)) as member:
        trouble = await member.troubled("unknown-topic")
        assert late in trouble.detail
        broker.create_topic(late)
        broker.produce(late, [b"here"])
        with trio.fail_after(30):
            await member.has_read(1)
        await member.hears(SourceRecovered)


@PROTOCOLS
async def test_a_topic_that_may_not_be_read_is_told_and_read_when_it_may(
    broker: Broker, kind: dict[str, Any]
) -> None:
    group = Group(broker, defaults=kind)
    group.fill(3)
    broker.deny(group.topic)
    async with group.open_member() as member:
        await member.troubled("authorization")
        broker.allow(group.topic)
        await member.has_read(12)
        await member.hears(SourceRecovered)
    assert places(member) == everything(range(4), 3)


async def test_a_topic_that_is_closed_while_it_is_read_is_told_and_read_on_when_it_is_open_again(
    broker: Broker,
) -> None:
    group = Group(broker)
    group.fill(3)
    async with group.open_member() as member:
        await member.has_read(12)
        broker.deny(group.topic)
        await member.troubled("authorization")
        broker.allow(group.topic)
        group.fill(3)
        await group.until(lambda: len({*places(member)}) == 24)
        await member.hears(SourceRecovered)
    assert group.committed() == dict.fromkeys(range(4), 6)


# --------------------------------------------------------------------------------------------------------- identity


def tls(broker: Broker) -> dict[str, Any]:
    return {
        "bootstrap_servers": broker.tls,
        "security_protocol": "ssl",
        "ca_file": str(broker.certificates.authority),
    }


def client_certificate(broker: Broker) -> dict[str, Any]:
    return tls(broker) | {
        "certificate_file": str(broker.certificates.client),
        "key_file": str(broker.certificates.client_key),
    }


def sasl(broker: Broker) -> dict[str, Any]:
    return {
        "bootstrap_servers": broker.sasl,
        "security_protocol": "sasl_plaintext",
        "sasl_mechanism": "SCRAM-SHA-512",
        "username": USER,
        "password": PASSWORD,
    }


def sasl_tls(broker: Broker) -> dict[str, Any]:
    return {
        **(tls(broker) | sasl(broker)),
        "bootstrap_servers": broker.sasl_tls,
        "security_protocol": "sasl_ssl",
    }


def plain_tls(broker: Broker) -> dict[str, Any]:
    return sasl_tls(broker) | {"sasl_mechanism": "PLAIN"}


@pytest.mark.usefixtures("patient_questions")
@pytest.mark.parametrize("way", [tls, client_certificate, sasl, sasl_tls, plain_tls])
async def test_a_client_that_says_who_it_is_reads_and_commits(broker: Broker, way: Any) -> None:
    group = Group(broker)
    group.fill(3)
    async with group.open_member(**way(broker)) as member:
        await member.has_read(12)
    assert group.committed() == dict.fromkeys(range(4), 3)
    assert not member.troubles


async def test_a_wrong_password_is_told_and_nothing_of_it(broker: Broker) -> None:
    group = Group(broker)
    async with group.open_member(**sasl(broker) | {"password": "hunter2"}) as member:
        trouble = await member.troubled("authentication")
    assert "hunter2" not in trouble.detail
    assert not member.records


async def test_a_certificate_of_an_authority_that_we_do_not_trust_is_told(broker: Broker) -> None:
    group = Group(broker)
    other = str(broker.certificates.other_authority)
    async with group.open_member(**tls(broker) | {"ca_file": other}) as member:
        await member.troubled("authentication")
    assert not member.records


# ---------------------------------------------------------------------------------------------- brokers and networks


@PROTOCOLS
async def test_a_broker_that_is_killed_and_comes_back_is_read_on_from(
    own_broker: Broker, kind: dict[str, Any]
) -> None:
    group = Group(own_broker, defaults=kind)
    group.fill(5)
    async with group.open_member() as member:
        await member.has_read(20)
        await group.until_committed(dict.fromkeys(range(4), 5))
        await trio.to_thread.run_sync(own_broker.kill)
        await member.troubled("no-broker")
        await trio.to_thread.run_sync(own_broker.start)
        group.fill(5)
        await group.until(lambda: len({*places(member)}) == 40)
        await member.hears(SourceRecovered)
        await group.until_committed(dict.fromkeys(range(4), 10))
    assert places(member) == everything(range(4), 10)


@pytest.mark.parametrize(("how", "seconds"), [("drop", 0), ("stall", 30)])
async def test_a_member_that_was_cut_off_reads_on_when_the_network_is_back(
    broker: Broker, how: Any, seconds: float
) -> None:
    group = Group(broker)
    group.fill(5)
    async with group.open_member(bootstrap_servers=broker.relayed) as member:
        await member.has_read(20)
        await group.until_committed(dict.fromkeys(range(4), 5))
        broker.relay.cut(how)
        group.fill(5)
        await member.hears(PartitionsLost)
        await trio.sleep(
            seconds
        )  # the client's own patience with requests and connections ends in here
        broker.relay.mend()
        await member.has_read(40)
        await member.hears(SourceRecovered)
        await group.until_committed(dict.fromkeys(range(4), 10))
    assert places(member) == everything(range(4), 10)


async def test_a_network_with_long_ways_is_read_through_without_losing_the_membership(
    broker: Broker,
) -> None:
    group = Group(broker)
    group.fill(50)
    broker.relay.slow(delay_s=0.2, bytes_per_s=100_000)
    async with group.open_member(bootstrap_servers=broker.relayed) as member:
        await member.has_read(200)
        await member.hears(OffsetsCommitted)
    assert places(member) == everything(range(4), 50)
    assert not member.of(PartitionsLost)
    assert group.committed() == dict.fromkeys(range(4), 50)


async def test_a_broker_that_hangs_for_longer_than_the_session_is_read_on_from(
    own_broker: Broker,
) -> None:
    group = Group(own_broker)
    group.fill(5)
    async with group.open_member() as member:
        await member.has_read(20)
        await group.until_committed(dict.fromkeys(range(4), 5))
        own_broker.pause()
        await member.hears(PartitionsLost)
        own_broker.go_on()
        group.fill(5)
        await group.until(lambda: len({*places(member)}) == 40)
        await group.until_committed(dict.fromkeys(range(4), 10))
    assert places(member) == everything(range(4), 10)
    assert not any(event.kind == "commit" for event in member.of(SourceTrouble))
