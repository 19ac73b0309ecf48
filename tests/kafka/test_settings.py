from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from stationmaster.errors import ConfigError
from stationmaster.kafka import KafkaSettings, open_kafka_source
from stationmaster.kafka.settings import key_in

GOOD: dict[str, Any] = {"bootstrap_servers": "127.0.0.1:9", "group_id": "g", "topics": ("t",)}


def test_without_the_client_the_extra_is_named() -> None:
    code = "import sys; sys.modules['confluent_kafka'] = None; import stationmaster.kafka"
    told = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60
    ).stderr
    assert "stationmaster.kafka needs the extra: pip install 'stationmaster[kafka]'" in told


def test_offsets_are_ours_whatever_the_options_say() -> None:
    configuration = KafkaSettings(**GOOD, options={"fetch.min.bytes": 2}).client_configuration()
    assert configuration["enable.auto.commit"] is False
    assert configuration["enable.auto.offset.store"] is False
    assert configuration["fetch.min.bytes"] == 2


@pytest.mark.parametrize(
    "key",
    [
        "enable.auto.commit",
        "auto.commit.enable",
        "auto.commit.interval.ms",
        "enable.auto.offset.store",
        "enable.partition.eof",
    ],
)
def test_an_option_that_would_move_offsets_is_refused_with_the_reason(key: str) -> None:
    with pytest.raises(ConfigError, match=f"kafka.options: {key} .* only after its batch"):
        KafkaSettings(**GOOD, options={key: True})


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("bootstrap.servers", "bootstrap_servers"),
        ("metadata.broker.list", "bootstrap_servers"),
        ("group.id", "group_id"),
        ("group.instance.id", "instance_id"),
        ("group.protocol", "group_protocol"),
        ("partition.assignment.strategy", "assignor"),
        ("session.timeout.ms", "session_timeout_s"),
        ("auto.offset.reset", "start"),
        ("security.protocol", "security_protocol"),
        ("sasl.mechanism", "sasl_mechanism"),
        ("sasl.mechanisms", "sasl_mechanism"),
        ("sasl.username", "username"),
        ("sasl.password", "password"),
        ("ssl.ca.location", "ca_file"),
        ("ssl.certificate.location", "certificate_file"),
        ("ssl.key.location", "key_file"),
    ],
)
def test_an_option_with_a_key_of_its_own_is_refused_and_the_key_is_named(
    key: str, name: str
) -> None:
    with pytest.raises(ConfigError, match=f"kafka.options: {key} .* use kafka.{name}"):
        KafkaSettings(**GOOD, options={key: "x"})


def test_every_fault_is_named_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        KafkaSettings(
            bootstrap_servers="",
            group_id="",
            topics=("^all.*", ""),
            max_poll_messages=0,
            poll_timeout_s=float("nan"),
            commit_interval_s=-1,
            progress_timeout_s=0,
            close_timeout_s=0,
            drain_timeout_s=-1,
            group_protocol="consumer",
            session_timeout_s=6,
            options={"group.id": "x"},
        )
    paths = [fault.partition(":")[0] for fault in caught.value.faults]
    assert paths == [
        "kafka.bootstrap_servers",
        "kafka.group_id",
        "kafka.topics",
        "kafka.topics",
        "kafka.max_poll_messages",
        "kafka.poll_timeout_s",
        "kafka.commit_interval_s",
        "kafka.progress_timeout_s",
        "kafka.close_timeout_s",
        "kafka.drain_timeout_s",
        "kafka.session_timeout_s",
        "kafka.options",
    ]


def test_no_topic_is_a_fault() -> None:
    with pytest.raises(ConfigError, match=r"kafka.topics: must not be empty"):
        KafkaSettings(bootstrap_servers="b", group_id="g", topics=())


def test_the_assignor_and_the_session_are_told_to_a_classic_group_only() -> None:
    classic = KafkaSettings(**GOOD, session_timeout_s=6, instance_id="one")
    assert classic.is_incremental
    told = classic.client_configuration()
    assert told["partition.assignment.strategy"] == "cooperative-sticky"
    assert told["session.timeout.ms"] == 6000
    assert told["group.instance.id"] == "one"
    assert not KafkaSettings(**GOOD, assignor="range").is_incremental
    new = KafkaSettings(**GOOD, group_protocol="consumer")
    assert new.is_incremental
    assert not {"partition.assignment.strategy", "session.timeout.ms"} & set(
        new.client_configuration()
    )


def test_options_do_not_show_in_a_log() -> None:
    assert "geheim" not in repr(KafkaSettings(**GOOD, options={"ssl.key.password": "geheim"}))


SASL: dict[str, Any] = {
    "security_protocol": "sasl_ssl",
    "sasl_mechanism": "SCRAM-SHA-512",
    "username": "reader",
    "password": "geheim",
}


def test_who_we_are_and_whom_we_trust_is_told_to_the_client() -> None:
    files: dict[str, Any] = {
        "ca_file": "ca.pem",
        "certificate_file": "us.pem",
        "key_file": "us.key",
    }
    settings = KafkaSettings(**GOOD, **SASL, **files)
    assert "geheim" not in repr(settings)
    told = settings.client_configuration()
    security = {key: value for key, value in told.items() if key.startswith(("se", "sasl", "ssl"))}
    assert security == {
        "security.protocol": "sasl_ssl",
        "sasl.mechanisms": "SCRAM-SHA-512",
        "sasl.username": "reader",
        "sasl.password": "geheim",
        "ssl.ca.location": "ca.pem",
        "ssl.certificate.location": "us.pem",
        "ssl.key.location": "us.key",
    }
    plain = KafkaSettings(**GOOD).client_configuration()
    assert [key for key in plain if key.startswith(("sasl", "ssl"))] == []
    assert plain["security.protocol"] == "plaintext"


@pytest.mark.parametrize(
    ("given", "faulty"),
    [
        ({"security_protocol": "SSL"}, ["security_protocol"]),
        ({"security_protocol": "tls", "sasl_mechanism": "X"}, ["security_protocol", "sasl_mechanism"]),
        ({"security_protocol": "sasl_ssl"}, ["sasl_mechanism", "username", "password"]),
        (SASL | {"username": "", "password": ""}, ["username", "password"]),
        (SASL | {"security_protocol": "ssl"}, ["sasl_mechanism", "username", "password"]),
        (SASL | {"security_protocol": "sasl_plaintext", "ca_file": "ca.pem"}, ["ca_file"]),
        ({"ca_file": "a", "certificate_file": "b", "key_file": "c"}, ["ca_file", "certificate_file", "key_file"]),
        ({"security_protocol": "ssl", "key_file": "c"}, ["certificate_file"]),
        (SASL | {"certificate_file": "b"}, ["key_file"]),
        ({"security_protocol": "ssl"}, []),
        (SASL, []),
    ],
)  # fmt: skip
def test_security_is_checked_together_and_names_no_secret(
    given: dict[str, Any], faulty: list[str]
) -> None:
    faults: tuple[str, ...] = ()
    try:
        KafkaSettings(**GOOD, **given)
    except ConfigError as error:
        faults = error.faults
    assert [fault.partition(":")[0] for fault in faults] == [f"kafka.{name}" for name in faulty]
    assert "geheim" not in "".join(faults)


async def test_a_certificate_that_is_not_there_is_a_configuration_error() -> None:
    settings = KafkaSettings(**GOOD, security_protocol="ssl", ca_file="/nowhere/ca.pem")
    with pytest.raises(ConfigError, match=r"ssl.ca.location|/nowhere/ca.pem"):
        async with open_kafka_source(settings):
            pass


@pytest.mark.parametrize(
    "options", [{"no.such.key": 1}, {"queued.max.messages.kbytes": "many"}, {"stats_cb": "x"}]
)
async def test_what_the_client_refuses_is_a_configuration_error(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"kafka.options: .*(no.such.key|queued.max|stats_cb)"):
        async with open_kafka_source(KafkaSettings(**GOOD, options=options)):
            pass


@pytest.mark.parametrize(
    ("said", "key"),
    [
        ("ssl.ca.location failed: No such file", "kafka.ca_file"),
        ('No such configuration property: "no.such.key"', "kafka.options"),
    ],
)
def test_what_the_client_complains_of_is_told_by_our_own_key(said: str, key: str) -> None:
    assert key_in(said) == key
