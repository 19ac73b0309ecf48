"""The log of records: written before a history begins, so that what is read again is the same."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Final, TypeAlias

import orjson

from tests.simulation.dice import Dice, Fault
from tests.telemetry import message_bytes

if TYPE_CHECKING:
    from stationmaster.testing import MemorySource

Name: TypeAlias = tuple[str, int, int]
"""Topic, partition and offset of a record."""

TOPICS: Final = {"air": 2, "water": 1}
"""Topic -> partitions."""
STATIONS: Final = tuple(f"S{number:02}" for number in range(12))
POISON: Final = b"\xff no message"
_MARK: Final = "record/"


def mark(name: Name) -> str:
    """Return the id of the station that stands in one record only: by it an upload shows what it holds."""
    topic, partition, offset = name
    return f"{_MARK}{topic}/{partition}/{offset}"


def write_log(log: MemorySource, dice: Dice, *, messages: int) -> set[Name]:
    """Write messages into a log, and return which of them need no home: they name no station."""
    plain = dice.plain
    empty: set[Name] = set()
    ends: dict[tuple[str, int], int] = {}
    everywhere = [(topic, number) for topic, count in TOPICS.items() for number in range(count)]
    for _ in range(messages):
        topic, partition = plain.choice(everywhere)
        offset = ends.get((topic, partition), 0)
        if plain.random() < 0.05:
            offset += plain.randrange(1, 4)  # logs have gaps
        ends[topic, partition] = offset + 1
        name = (topic, partition, offset)
        stations: list[str] = plain.sample(STATIONS, plain.randrange(len(STATIONS)))
        if plain.random() < 0.03:
            stations.clear()
            empty.add(name)
        else:
            stations.insert(plain.randrange(len(stations) + 1), mark(name))
        if dice.strikes(Fault.STRANGERS, 0.03):
            stations += [f"stranger/{topic}/{partition}/{offset}/{number}" for number in range(60)]
            if name in empty:
                empty.remove(name)
                stations.append(mark(name))
        # A few records of each partition have one time.
        value = message_bytes(*stations, timestamp=offset // 3 * 60_000)
        if dice.strikes(Fault.POISON, 0.08):
            value = POISON
            empty.discard(name)
        log.put(topic, partition, value, offset=offset)
    log.end()
    return empty


@lru_cache(maxsize=1024)
def records_in(body: bytes) -> frozenset[Name]:
    """Return the records whose stations stand in an upload, done or not."""
    form = orjson.loads(body)
    found = set()
    for each in (*form["results"], *form["unsuccessful"]):
        if each["stationId"].startswith(_MARK):
            _, topic, partition, offset = each["stationId"].split("/")
            found.add((topic, int(partition), int(offset)))
    return frozenset(found)
