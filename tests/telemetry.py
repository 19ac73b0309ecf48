"""Records, messages, batches and stations for the tests of the core."""

from __future__ import annotations

from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import trio

from stationmaster.abc import NullObserver
from stationmaster.batch import Batch, Message, OffsetRange, Record
from stationmaster.collector import Collector
from stationmaster.drafts import draft_batch
from stationmaster.messages import Limits, parse_message
from stationmaster.stations import Stations, open_stations
from stationmaster.testing import telemetry

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from stationmaster.abc import Observer, StationHandler
    from stationmaster.batch import StationResult

NOON = datetime(2024, 1, 1, 12, tzinfo=UTC)


def message_bytes(*stations: Any, **fields: Any) -> bytes:
    """Return a message of these stations (ids, or whatever stands there as an entry) with these other fields."""
    return telemetry(*stations, **fields)


def record(
    value: bytes | None = None,
    *,
    topic: str = "air",
    partition: int = 0,
    offset: int = 0,
    timestamp_ms: int = 0,
    generation: int = 0,
) -> Record:
    """Return a record with this value."""
    return Record(
        topic=topic,
        partition=partition,
        offset=offset,
        timestamp_ms=timestamp_ms,
        value=value,
        generation=generation,
    )


def message(*stations: object, **place: Any) -> Message:
    """Return a parsed message; `place` says where its record stood."""
    parsed = parse_message(record(message_bytes(*stations), **place), Limits())
    assert isinstance(parsed, Message)
    return parsed


def batch(*station_ids: str, deadline: float = 5.0, offset: int = 0) -> Batch:
    """Return an opened batch of one message of these stations."""
    draft = draft_batch([message(*station_ids, offset=offset)], by="message", group_id="")
    return Batch(
        batch_id=draft.batch_id,
        topic=draft.topic,
        opened_at=NOON,
        deadline=deadline,
        ranges=draft.ranges,
        entries=draft.entries,
        last_message=draft.last_message,
        size_bytes=draft.size_bytes,
    )


def one(offset: int, *, partition: int = 0, topic: str = "air", generation: int = 0) -> OffsetRange:
    """Return the range of one record."""
    return OffsetRange(
        topic=topic, partition=partition, first=offset, last=offset, generation=generation
    )


@asynccontextmanager
async def stations_of(
    handler: StationHandler,
    *,
    queue_capacity: int = 64,
    max_live: int = 1_000,
    idle_s: float = 600.0,
    result_bytes: int = 10_000,
    job_timeout_s: float | None = None,
    breaker_failures: int = 0,
    breaker_probe_s: float = 10.0,
    on_eased: Callable[[], None] = lambda: None,
    observer: Observer | None = None,
) -> AsyncIterator[Stations]:
    """Open stations with roomy bounds, and without breakers."""
    async with open_stations(
        handler,
        queue_capacity=queue_capacity,
        max_live=max_live,
        idle_s=idle_s,
        result_bytes=result_bytes,
        job_timeout_s=job_timeout_s,
        breaker_failures=breaker_failures,
        breaker_probe_s=breaker_probe_s,
        on_eased=on_eased,
        on_crash=lambda: None,
        observer=observer or NullObserver(),
    ) as stations:
        yield stations


def opened(
    *station_ids: str, deadline_s: float = 5.0, offset: int = 0, observer: Observer | None = None
) -> Collector:
    """Open a batch of one message of these stations now."""
    now = trio.current_time()
    return Collector(
        batch(*station_ids, deadline=now + deadline_s, offset=offset),
        opened=now,
        quorum=1.0,
        report_bytes=10**9,
        observer=observer or NullObserver(),
    )


async def closed(collector: Collector) -> dict[str, StationResult]:
    """Wait as a batch task does, and close."""
    with trio.move_on_at(collector.deadline):
        await collector.done.wait()
    return {item.station_id: item for item in collector.close(closed_at=NOON).results}


async def run(stations: Stations, *station_ids: str, **settings: Any) -> dict[str, StationResult]:
    """Give every station a job of one new batch, and wait for its end."""
    return await closed(submit(stations, *station_ids, **settings))


def submit(stations: Stations, *station_ids: str, **settings: Any) -> Collector:
    """Give every station a job of one new batch."""
    collector = opened(*station_ids, **settings)
    for station_id in station_ids:
        stations.submit(collector, station_id)
    return collector


def live_tasks() -> list[str]:
    """Return the names of all live tasks."""
    names: list[str] = []
    waiting = [trio.lowlevel.current_root_task()]
    while waiting:
        task = waiting.pop()
        assert task is not None
        names.append(task.name)
        waiting += [child for nursery in task.child_nurseries for child in nursery.child_tasks]
    return names
