"""What every place for dead letters must do: in memory, on a real SQLite file, and in a topic of a Kafka broker."""

from __future__ import annotations

import base64
import json
import sqlite3
from contextlib import asynccontextmanager, closing
from typing import TYPE_CHECKING, Any, Protocol

import attrs
import pytest
import trio
from trio.testing import assert_checkpoints

from stationmaster.batch import DeadLetter
from stationmaster.errors import StoreError
from stationmaster.kafka import KafkaSettings
from stationmaster.kafka.dead_letters import KafkaDeadLetters, open_kafka_dead_letters
from stationmaster.state import open_state
from stationmaster.testing import MemoryDeadLetters
from tests.kafka.topics import read_topic

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from stationmaster.abc import DeadLetters
    from tests.kafka_broker import KafkaBroker

MAX_BYTES = 3000


class Place(Protocol):
    """Dead letters, and a look behind them."""

    @property
    def letters(self) -> DeadLetters: ...

    def kept(self) -> list[DeadLetter]: ...

    def clear(self) -> None:
        """Do what an operator does who has looked at them."""


@attrs.frozen
class InMemory:
    letters: MemoryDeadLetters

    def kept(self) -> list[DeadLetter]:
        return self.letters.letters

    def clear(self) -> None:
        self.letters.clear()


@attrs.frozen
class OnDisk:
    letters: DeadLetters
    path: Path

    def kept(self) -> list[DeadLetter]:
        query = (
            'SELECT reason, detail, topic, partition, "offset", timestamp_ms, value, batch_id,'
            " headers FROM dead_letters ORDER BY seq"
        )
        names = (
            "reason",
            "detail",
            "topic",
            "partition",
            "offset",
            "timestamp_ms",
            "value",
            "batch_id",
        )
        with closing(sqlite3.connect(self.path)) as db:
            return [
                DeadLetter(**dict(zip(names, row, strict=True)), headers=_headers(headers))
                for *row, headers in db.execute(query)
            ]

    def clear(self) -> None:
        with closing(sqlite3.connect(self.path)) as db, db:
            db.execute("DELETE FROM dead_letters")


@attrs.frozen
class InTopic:
    """Without a bound of its own; seen as by a reader who goes by the keys."""

    letters: KafkaDeadLetters
    broker: KafkaBroker

    def kept(self) -> list[DeadLetter]:
        seen: dict[bytes | None, DeadLetter] = {}
        for record in read_topic(self.broker, self.letters.topic):
            headers: list[Any] = list(record.headers() or [])
            facts = {name: value for name, value in headers if name.startswith("stationmaster-")}

            def fact(name: str, facts: dict[str, Any] = facts) -> str:
                return str(facts.get(f"stationmaster-{name}", b"").decode())

            kept = DeadLetter(
                reason=fact("reason"),
                detail=fact("detail"),
                topic=fact("topic"),
                partition=int(fact("partition")),
                offset=int(fact("offset")),
                timestamp_ms=int(fact("timestamp")),
                headers=tuple(header for header in headers if header[0] not in facts),
                value=None if fact("tombstone") else record.value(),
                batch_id=fact("batch-id"),
            )
            seen.setdefault(record.key(), kept)
        return list(seen.values())

    def clear(self) -> None:
        raise NotImplementedError("a topic is emptied by its retention")


def _headers(text: str) -> tuple[tuple[str, bytes | None], ...]:
    return tuple(
        (name, None if value is None else base64.b64decode(value))
        for name, value in json.loads(text)
    )


@asynccontextmanager
async def in_memory(folder: Path, broker: KafkaBroker) -> AsyncIterator[Place]:
    yield InMemory(MemoryDeadLetters(max_bytes=MAX_BYTES))


@asynccontextmanager
async def on_disk(folder: Path, broker: KafkaBroker) -> AsyncIterator[Place]:
    path = folder / "state.sqlite"
    async with open_state(path, dead_letters_max_bytes=MAX_BYTES) as state:
        yield OnDisk(state.dead_letters, path)


@asynccontextmanager
async def in_topic(folder: Path, broker: KafkaBroker) -> AsyncIterator[Place]:
    settings = KafkaSettings(
        bootstrap_servers=broker.bootstrap_servers, group_id="g", topics=("air",)
    )
    async with open_kafka_dead_letters(settings, topic=broker.create_topic()) as letters:
        yield InTopic(letters, broker)


@pytest.fixture(params=[in_memory, on_disk, in_topic])
async def place(
    request: pytest.FixtureRequest, tmp_path: Path, kafka_broker: KafkaBroker
) -> AsyncIterator[Place]:
    with trio.fail_after(20):
        async with request.param(tmp_path, kafka_broker) as opened:
            yield opened


@pytest.fixture(params=[in_memory, on_disk])
async def bounded_place(
    request: pytest.FixtureRequest, tmp_path: Path, kafka_broker: KafkaBroker
) -> AsyncIterator[Place]:
    with trio.fail_after(20):
        async with request.param(tmp_path, kafka_broker) as opened:
            yield opened


def letter(offset: int = 5, **changes: Any) -> DeadLetter:
    plain: dict[str, Any] = {
        "reason": "not-json",
        "detail": "unexpected end",
        "topic": "air",
        "partition": 2,
        "offset": offset,
        "timestamp_ms": 1_700_000_000_000,
        "value": b"\x00{",
    }
    return DeadLetter(**(plain | changes))


async def test_letters_are_kept_whole_and_in_order(place: Place) -> None:
    letters = [
        letter(5, headers=(("trace", b"\xff\x00"), ("trace", None))),
        letter(4, value=None),
        letter(3, value=b""),
        letter(3, batch_id="air_2_3_1700000000", reason="rejected-upload"),
    ]
    await place.letters.keep(letters)
    assert place.kept() == letters


async def test_a_letter_that_comes_again_is_kept_once(place: Place) -> None:
    await place.letters.keep([letter(1), letter(2)])
    await place.letters.keep([letter(2, detail="second thoughts"), letter(3), letter(3)])
    assert place.kept() == [letter(1), letter(2), letter(3)]


async def test_an_offset_with_another_time_is_another_letter(place: Place) -> None:
    again = letter(1, timestamp_ms=1_800_000_000_000)  # the topic was made anew
    await place.letters.keep([letter(1), again])
    assert place.kept() == [letter(1), again]


async def test_letters_that_do_not_fit_are_refused_all_together(bounded_place: Place) -> None:
    await bounded_place.letters.keep([letter(1, value=b"x" * (MAX_BYTES - 200))])
    with pytest.raises(StoreError, match="full") as caught:
        await bounded_place.letters.keep([letter(2), letter(3, value=b"x" * 200)])
    assert caught.value.kind == "full"
    assert len(bounded_place.kept()) == 1
    await bounded_place.letters.keep([letter(1, value=b"x" * (MAX_BYTES - 200)), letter(2)])
    assert len(bounded_place.kept()) == 2


async def test_there_is_room_as_soon_as_an_operator_made_some(bounded_place: Place) -> None:
    await bounded_place.letters.keep([letter(1, value=b"x" * MAX_BYTES)])
    with pytest.raises(StoreError):
        await bounded_place.letters.keep([letter(2)])
    bounded_place.clear()
    await bounded_place.letters.keep([letter(2)])
    assert bounded_place.kept() == [letter(2)]


async def test_letters_larger_than_the_bound_are_taken_when_nothing_else_is_there(
    place: Place,
) -> None:
    await place.letters.keep([letter(1, value=b"x" * MAX_BYTES), letter(2, value=b"y" * MAX_BYTES)])
    assert len(place.kept()) == 2


async def test_no_letters_are_fine_and_keeping_is_a_checkpoint(place: Place) -> None:
    with assert_checkpoints():
        await place.letters.keep([])
    with assert_checkpoints():
        await place.letters.keep([letter()])
    assert place.kept() == [letter()]
