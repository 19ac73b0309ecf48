"""The broker as a process: its ready line, its topics, its end."""

from __future__ import annotations

import json
import subprocess
import sys

from click.testing import CliRunner
from confluent_kafka import Consumer

from stationmaster.service import broker

COMMAND = [sys.executable, "-m", "stationmaster.service.broker"]


def test_it_says_where_it_listens_has_its_topics_and_ends_with_its_standard_input() -> None:
    options = ["--brokers", "2", "--topic", "wind", "--topic", "solar"]
    with subprocess.Popen(
        [*COMMAND, *options], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        servers = json.loads(process.stdout.readline())["bootstrapServers"]
        consumer = Consumer({"bootstrap.servers": servers, "group.id": "g", "log_level": 0})
        found = consumer.list_topics(timeout=10)
        consumer.close()
        assert len(servers.split(",")) == len(found.brokers) == 2
        assert {name: len(topic.partitions) for name, topic in found.topics.items()} == {
            "wind": 4,
            "solar": 4,
        }
        process.stdin.close()
        assert process.wait(20) == 0


def test_it_ends_at_sigterm() -> None:
    with subprocess.Popen(COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline()
        process.terminate()
        assert process.wait(20) != 0


def test_it_explains_itself() -> None:
    told = CliRunner().invoke(broker.main, ["--help"])
    assert told.exit_code == 0
    assert "--topic" in told.output
