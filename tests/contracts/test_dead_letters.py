"""Dead letters in memory, on a real SQLite file, and in a topic of a Kafka broker keep the contract."""

from __future__ import annotations

import base64
import json
import sqlite3
from contextlib import asynccontextmanager, closing
from typing import TYPE_CHECKING, Any

import pytest

from stationmaster.batch import DeadLetter
from stationmaster.kafka import KafkaSettings
from stationmaster.kafka.dead_letters import open_kafka_dead_letters
from stationmaster.state import open_state
from stationmaster.testing import MemoryDeadLetters
from stationmaster.testing.contracts import BoundedDeadLettersContract, DeadLettersContract
from stationmaster.testing.contracts.running import in_trio
from tests.kafka.topics import read_topic

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from stationmaster.abc import DeadLetters
    from tests.kafka_broker import KafkaBroker


class _InOneState(BoundedDeadLettersContract):
    @in_trio
    async def test_another_message_in_the_same_place_is_another_letter(self) -> None:
        # Lines of two files: the same topic, line and time.
        letters = [_letter("not-json", value) for value in (b"{one", b"{two", None, b"")]
        async with self.open() as place:
            await place.keep(letters[:1])
            await place.keep(letters)
            await place.keep(letters)
            assert list(await self.kept()) == letters

    @in_trio
    async def test_a_rejected_batch_is_kept_once_though_its_body_was_made_anew(self) -> None:
        first, again = (
            _letter("rejected-upload", value, batch_id="air_0_0_0") for value in (b"1", b"2")
        )
        async with self.open() as place:
            await place.keep([first])
            await place.keep([again])
            assert list(await self.kept()) == [first]


def _letter(reason: str, value: bytes | None, *, batch_id: str = "") -> DeadLetter:
    return DeadLetter(
        reason=reason,
        detail="",
        topic="air",
        partition=0,
        offset=0,
        timestamp_ms=0,
        value=value,
        batch_id=batch_id,
    )


class TestMemoryDeadLetters(_InOneState):
    @asynccontextmanager
    async def open(self) -> AsyncIterator[DeadLetters]:
        self.place = MemoryDeadLetters(max_bytes=self.max_bytes)
        yield self.place

    async def kept(self) -> list[DeadLetter]:
        return self.place.letters

    def clear(self) -> None:
        self.place.clear()


class TestDeadLettersOnDisk(_InOneState):
    patience_s = 20.0

    @pytest.fixture(autouse=True)
    def _path(self, tmp_path: Path) -> None:
        self.path = tmp_path / "state.sqlite"

    @asynccontextmanager
    async def open(self) -> AsyncIterator[DeadLetters]:
        async with open_state(self.path, dead_letters_max_bytes=self.max_bytes) as state:
            yield state.dead_letters

    async def kept(self) -> list[DeadLetter]:
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


def _headers(text: str) -> tuple[tuple[str, bytes | None], ...]:
    return tuple(
        (name, None if value is None else base64.b64decode(value))
        for name, value in json.loads(text)
    )


class TestDeadLettersInATopic(DeadLettersContract):
    """Without a bound of their own; seen as by a reader who goes by the keys."""

    patience_s = 20.0

    @pytest.fixture(autouse=True)
    def _broker(self, kafka_broker: KafkaBroker) -> None:
        self.broker = kafka_broker
        self.topic = kafka_broker.create_topic()

    @asynccontextmanager
    async def open(self) -> AsyncIterator[DeadLetters]:
        settings = KafkaSettings(
            bootstrap_servers=self.broker.bootstrap_servers, group_id="g", topics=("air",)
        )
        async with open_kafka_dead_letters(settings, topic=self.topic) as letters:
            yield letters

    async def kept(self) -> list[DeadLetter]:
        seen: dict[bytes | None, DeadLetter] = {}
        for record in read_topic(self.broker, self.topic):
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
