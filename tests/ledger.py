"""The books of the chaos tests: what a broker acknowledged, and where it stands afterwards.

A ledger's thread produces at a steady rate and notes each record with the place that the broker gave it. A balance
compares that with the receiver's database and the services' state files.
"""

from __future__ import annotations

import enum
import json
import random
import sqlite3
import threading
import time
from contextlib import closing, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import attrs
from confluent_kafka import Producer

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    from confluent_kafka import KafkaError, Message

Place: TypeAlias = tuple[int, int]
"""Partition and offset."""

STATIONS: Final = 300
FLUSH_S: Final = 60.0
_LOOK_S: Final = 0.1


class Kind(enum.Enum):
    """Where a record has to end."""

    GOOD = "at the receiver, or in an outbox"
    POISON = "in the dead letters"
    EMPTY = "nowhere: it has no station"


@attrs.frozen(kw_only=True)
class Content:
    """What a record holds."""

    kind: Kind
    value: bytes | None
    stations: frozenset[str] = frozenset()


def draw(number: int, dice: random.Random) -> Content:
    """Make the record of this number: nine of ten are good."""
    fate = dice.random()
    if fate < 0.9:
        stations = [f"S{n:03}" for n in dice.sample(range(STATIONS), dice.randint(2, 5))]
        entries = [{"stationId": station, "x": number} for station in stations]
        value = json.dumps({"stationData": entries, "number": number}).encode()
        return Content(kind=Kind.GOOD, value=value, stations=frozenset(stations))
    if fate < 0.92:
        return Content(kind=Kind.EMPTY, value=b'{"stationData": []}')
    poisons = [
        None,  # a tombstone
        b"",
        b"{%d" % number,
        b"\xff",
        b"[%d]" % number,
        b'{"stationData": %d}' % number,
        b'{"stationData": [{"stationId": %d}]}' % number,
    ]
    return Content(kind=Kind.POISON, value=dice.choice(poisons))


@attrs.define(eq=False)
class Ledger:
    """Produces in a thread of its own, made by `open_ledger`; any thread may read `entries`, which only grows."""

    topic: str
    partitions: int
    entries: dict[Place, Content] = attrs.field(factory=dict, init=False)
    refused: list[str] = attrs.field(factory=list, init=False)
    """Why records were not taken."""
    unanswered: int = attrs.field(default=0, init=False)
    """Records of which the broker has said nothing up to the end."""
    _stop: threading.Event = attrs.field(factory=threading.Event, init=False)
    _given_up: threading.Event = attrs.field(factory=threading.Event, init=False)
    _thread: threading.Thread | None = attrs.field(default=None, init=False)

    def finish(self) -> None:
        """Produce no more, and wait for the broker's last word. Blocks, a minute at most."""
        assert self._thread is not None
        self._stop.set()
        self._thread.join(2 * FLUSH_S)
        assert not self._thread.is_alive(), "the producer hangs"
        assert not self.refused, self.refused[:5]
        assert not self.unanswered

    def ends(self) -> dict[int, int]:
        """Return the offset after the last acknowledged one of every partition that has any."""
        ends: dict[int, int] = {}
        for partition, offset in tuple(self.entries):
            ends[partition] = max(ends.get(partition, 0), offset + 1)
        return ends

    def _run(self, bootstrap: str, per_s: float, dice: random.Random) -> None:
        producer = Producer(
            {
                "bootstrap.servers": bootstrap,
                "acks": "all",
                "enable.idempotence": True,  # or a record could stand there twice, once unknown to us
                "linger.ms": 5,
                "log_level": 0,
                "reconnect.backoff.max.ms": 200,
            }
        )
        number = 0
        while not self._stop.wait(1 / per_s):
            content = draw(number, dice)
            note = partial(self._note, content)
            partition = dice.randrange(self.partitions)
            producer.produce(self.topic, content.value, partition=partition, on_delivery=note)
            producer.poll(0)
            number += 1
        deadline = time.monotonic() + FLUSH_S
        while (left := producer.flush(_LOOK_S)) and time.monotonic() < deadline:
            if self._given_up.is_set():
                break
        self.unanswered = left

    def _note(self, content: Content, error: KafkaError | None, message: Message) -> None:
        if error is not None:
            self.refused.append(error.str())
            return
        partition, offset = message.partition(), message.offset()
        assert partition is not None
        assert offset is not None
        self.entries[partition, offset] = content


@contextmanager
def open_ledger(
    bootstrap: str, topic: str, *, partitions: int, per_s: float, seed: int
) -> Iterator[Ledger]:
    """Produce so many records a second until `finish`, or the block ends: that does not wait for the broker's word."""
    ledger = Ledger(topic, partitions)
    arguments = (bootstrap, per_s, random.Random(seed))
    ledger._thread = threading.Thread(target=ledger._run, args=arguments, name=f"ledger {topic}")
    ledger._thread.start()
    try:
        yield ledger
    finally:
        ledger._stop.set()
        ledger._given_up.set()  # who leaves without `finish` is cancelled or fails, and the broker may be gone
        ledger._thread.join(2 * FLUSH_S)


# --------------------------------------------------------------------------------------------------------- the balance


@attrs.frozen(kw_only=True)
class Stock:
    """What stands where. Read outboxes first: a batch leaves them for the receiver, never the other way."""

    kept: Mapping[Place, Mapping[str, Any]]
    """Bodies in the outboxes."""
    received: Mapping[Place, Mapping[str, Any]]
    """Bodies at the receiver."""
    letters: Mapping[Place, frozenset[bytes | None]]
    """Values in the dead letters."""
    sent_again: int
    """Deliveries to the receiver of batches that it held already."""
    double_rows: int
    """Results at the receiver that stand there twice for the same topic, partition, offset and station."""

    @classmethod
    def take(cls, database: Path, states: Iterable[Path]) -> Stock:
        """Read the receiver's database and the state files, while their owners run or after they died."""
        kept: dict[Place, Any] = {}
        letters: dict[Place, frozenset[bytes | None]] = {}
        for state in states:
            if not state.exists():
                continue
            with closing(sqlite3.connect(state)) as db:
                tables = {name for (name,) in db.execute("SELECT name FROM sqlite_master")}
                if not {"outbox", "dead_letters"} <= tables:
                    continue  # its owner is just making it: it holds nothing
                for (body,) in db.execute("SELECT body FROM outbox"):
                    kept |= _placed(body)
                rows = db.execute('SELECT partition, "offset", value FROM dead_letters')
                for partition, offset, value in rows:
                    place = (partition, offset)
                    letters[place] = letters.get(place, frozenset()) | {value}
        received: dict[Place, Any] = {}
        with closing(sqlite3.connect(database)) as db:
            for (body,) in db.execute("SELECT body FROM batches"):
                received |= _placed(body)
            (sent_again,) = db.execute(
                "SELECT coalesce(sum(deliveries), 0) - count(*) FROM batches"
            ).fetchone()
            (double_rows,) = db.execute(
                "SELECT coalesce(sum(times - 1), 0) FROM (SELECT count(*) AS times FROM results "
                "GROUP BY topic, partition, first_offset, station_id)"
            ).fetchone()
        return cls(
            kept=kept,
            received=received,
            letters=letters,
            sent_again=sent_again,
            double_rows=double_rows,
        )

    def holds(self, place: Place, content: Content) -> bool:
        """Tell whether a record has ended where it has to, whole."""
        match content.kind:
            case Kind.GOOD:
                body = self.received.get(place) or self.kept.get(place)
                return body is not None and _stations(body) == content.stations
            case Kind.POISON:
                return self.letters.get(place) == frozenset({content.value})
            case Kind.EMPTY:
                return True

    def misplaced(self, entries: Mapping[Place, Content]) -> list[Place]:
        """Return what stands where it does not belong: its record is of another kind, or none of ours."""
        good = {place for place, content in entries.items() if content.kind is Kind.GOOD}
        poison = {place for place, content in entries.items() if content.kind is Kind.POISON}
        return sorted(
            ((self.received.keys() | self.kept.keys()) - good) | (self.letters.keys() - poison)
        )

    def outcomes(self, outcome: str) -> int:
        """Return how many stations ended so, in all that was received."""
        return sum(body["counts"][outcome] for body in self.received.values())


def _placed(body: bytes) -> dict[Place, dict[str, Any]]:
    form = json.loads(body)
    (span,) = form["ranges"]  # by = "message"
    assert span["first"] == span["last"]
    return {(span["partition"], span["first"]): form}


def _stations(body: Mapping[str, Any]) -> frozenset[str]:
    return frozenset(each["stationId"] for each in (*body["results"], *body["unsuccessful"]))
