"""The corpus through the whole service: real processes, Kafka's protocol, a real target, one state file."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from typing import TYPE_CHECKING, Any

import pytest
from confluent_kafka import Producer

from tests.hostile.corpus import CORPUS, RECORD_MS, Hostile, of_stations
from tests.processes import (
    committed,
    kafka_config,
    open_broker,
    open_part,
    open_receiver,
    wait_until,
)

if TYPE_CHECKING:
    from pathlib import Path

TOPIC = "readings"
PARTITIONS = 4

Place = tuple[int, int]
"""Partition and offset."""


def produce_corpus(bootstrap: str) -> tuple[dict[Place, Hostile], dict[Place, str]]:
    """Produce every hostile message with a good one behind it; return where each lies, the good ones by station."""
    options: dict[str, Any] = {
        "bootstrap.servers": bootstrap,
        "log_level": 0,
        "message.max.bytes": 20_000_000,
        "compression.type": "gzip",  # this broker drops the oldest of a partition beyond 5 MiB
    }
    producer = Producer(options)
    hostile: dict[Place, Hostile] = {}
    good: dict[Place, str] = {}
    for number, each in enumerate(CORPUS):
        partition = number % PARTITIONS
        place = partition, 2 * (number // PARTITIONS)
        hostile[place] = each
        more: Any = {"partition": partition, "timestamp": RECORD_MS}
        producer.produce(TOPIC, each.value, headers=list(each.headers), **more)
        station_id = good[place[0], place[1] + 1] = f"good {number}"
        producer.produce(TOPIC, of_stations(station_id), **more)
    assert producer.flush(20) == 0
    return hostile, good


def letters(state: Path) -> dict[Place, tuple[str, bytes | None]]:
    """Return what the state file holds as dead letters: the reason and the value of each."""
    with closing(sqlite3.connect(state)) as db:
        query = 'SELECT partition, "offset", reason, value FROM dead_letters'
        return {(row[0], row[1]): (row[2], row[3]) for row in db.execute(query)}


def uploads(batches: dict[str, dict[str, Any]]) -> dict[Place, tuple[str, ...]]:
    """Return what the target holds: the stations of the batch of each record."""
    held: dict[Place, tuple[str, ...]] = {}
    for report in batches.values():
        (span,) = report["ranges"]
        assert span["first"] == span["last"], "a batch is one message"
        rows = [*report["results"], *report["unsuccessful"]]
        held[span["partition"], span["first"]] = tuple(sorted(row["stationId"] for row in rows))
    return held


@pytest.mark.once
async def test_every_hostile_message_is_uploaded_or_a_dead_letter_and_harms_no_good_one(
    tmp_path: Path,
) -> None:
    async with open_broker(TOPIC) as (broker, _), open_receiver(tmp_path) as receiver:
        hostile, good = produce_corpus(broker)
        config = kafka_config(
            tmp_path,
            broker=broker,
            topic=TOPIC,
            receiver=receiver.url,
            handler="tests.service.handlers:brief",
            extra="[batch]\ndeadline_s = 20.0",
        )
        lost = {place for place, each in hostile.items() if each.reason is not None}
        taken = {place: each for place, each in hostile.items() if each.reason is None}
        async with open_part(
            "run", "--config", str(config), "--set", "upload.empty=true"
        ) as service:
            everything = len(taken) + len(good)
            await receiver.wait_batches(everything, seconds=60)
            await wait_until(lambda: letters(tmp_path / "state.db").keys() >= lost)
            service.process.terminate()
            assert await service.ends() == 0
        held = uploads(receiver.batches())
        kept = letters(tmp_path / "state.db")
        ends = committed(broker, "test", TOPIC)
        assert receiver.deliveries() == everything

    assert {
        place: (each.reason, each.value) for place, each in hostile.items() if place in lost
    } == kept
    expected = {place: tuple(sorted(set(each.stations))) for place, each in taken.items()}
    assert held == expected | {place: (station_id,) for place, station_id in good.items()}
    places = hostile.keys() | good.keys()
    assert ends == {n: sum(partition == n for partition, _ in places) for n in range(PARTITIONS)}
