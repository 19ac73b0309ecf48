"""What `Pipeline.statistics()` tells of stations and threads in trouble: what is so now, not what ever was."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from stationmaster import PipelineSettings, open_pipeline
from stationmaster.events import (
    StationBreakerClosed,
    StationBreakerOpened,
    ThreadAbandoned,
    ThreadReturned,
)
from stationmaster.testing import MemorySource, RecordingSink
from tests.telemetry import message_bytes

if TYPE_CHECKING:
    from stationmaster import Pipeline, StationInput
    from stationmaster.events import Event


class Watcher:
    """Tells the statistics at each event of breakers and threads: what is told there holds already."""

    detailed = False

    def __init__(self) -> None:
        self.pipeline: Pipeline | None = None
        self.seen: list[tuple[type[Event], int, int]] = []
        self._next = trio.Event()

    def observe(self, event: Event, /) -> None:
        if isinstance(
            event, StationBreakerOpened | StationBreakerClosed | ThreadAbandoned | ThreadReturned
        ):
            assert self.pipeline is not None
            now = self.pipeline.statistics()
            self.seen.append((type(event), now.open_breakers, now.abandoned_threads))
            self._next.set()
            self._next = trio.Event()

    async def wait_for(self, count: int) -> None:
        while len(self.seen) < count:
            await self._next.wait()


async def test_open_breakers_are_counted_until_their_station_answers_or_is_given_up(
    autojump_clock: MockClock,
) -> None:
    async def handle(station: StationInput) -> None:
        # One heals, the other never does, the third is healthy.
        if station.station_id == "gone" or (
            station.station_id == "heals" and trio.current_time() < 10
        ):
            await trio.sleep_forever()

    source, watcher = MemorySource(), Watcher()
    settings = PipelineSettings(
        deadline_s=1, breaker_failures=1, breaker_probe_s=20, idle_s=60, quorum=1
    )
    async with open_pipeline(
        source, handler=handle, sink=RecordingSink(), settings=settings, observer=watcher
    ) as pipeline:
        watcher.pipeline = pipeline
        assert pipeline.statistics().open_breakers == 0
        source.put("air", 0, message_bytes("gone", "heals", "healthy"))
        await trio.sleep(15)
        assert pipeline.statistics().open_breakers == 2
        source.put("air", 0, message_bytes("heals"))  # too soon for a probe
        await trio.sleep(15)
        assert pipeline.statistics().open_breakers == 2
        source.put("air", 0, message_bytes("heals", "gone"))  # a probe of each
        await trio.sleep(15)
        assert pipeline.statistics().open_breakers == 1  # it opens once, however often it is tried
        await trio.sleep(200)
        assert pipeline.statistics().open_breakers == 0
        assert pipeline.statistics().live_stations == 0
    assert [(kind, breakers) for kind, breakers, _ in watcher.seen] == [
        (StationBreakerOpened, 1),
        (StationBreakerOpened, 2),
        (StationBreakerClosed, 1),
        (StationBreakerClosed, 0),
    ]


async def test_a_station_that_makes_room_for_another_takes_its_open_breaker_along(
    autojump_clock: MockClock,
) -> None:
    async def handle(station: StationInput) -> None:
        if station.station_id == "silent":
            await trio.sleep_forever()

    source, watcher = MemorySource(), Watcher()
    settings = PipelineSettings(deadline_s=1, breaker_failures=1, max_live=1)
    async with open_pipeline(
        source, handler=handle, sink=RecordingSink(), settings=settings, observer=watcher
    ) as pipeline:
        watcher.pipeline = pipeline
        source.put("air", 0, message_bytes("silent"))
        await trio.sleep(2)
        assert pipeline.statistics().open_breakers == 1
        source.put("air", 0, message_bytes("other"))
        await wait_all_tasks_blocked()
        assert pipeline.statistics().open_breakers == 0
        assert pipeline.statistics().live_stations == 1


async def test_abandoned_threads_are_counted_until_they_return(mock_clock: MockClock) -> None:
    started: list[str] = []
    passages = {name: threading.Event() for name in ("A", "B")}
    a_thread_started = trio.Event()

    def handle(station: StationInput) -> None:
        started.append(station.station_id)
        if len(started) == 2:
            trio.from_thread.run_sync(a_thread_started.set)
        passages[station.station_id].wait()

    source, watcher = MemorySource(), Watcher()
    async with open_pipeline(
        source, handler=handle, sink=RecordingSink(), observer=watcher
    ) as pipeline:
        watcher.pipeline = pipeline
        try:
            source.put("air", 0, message_bytes("A", "B"))
            await a_thread_started.wait()
            assert pipeline.statistics().abandoned_threads == 0  # they run, and their batch is open
            mock_clock.jump(5)
            await watcher.wait_for(2)
            assert pipeline.statistics().abandoned_threads == 2
            passages["A"].set()
            await watcher.wait_for(3)
            assert pipeline.statistics().abandoned_threads == 1
            passages["B"].set()
            await watcher.wait_for(4)
            assert pipeline.statistics().abandoned_threads == 0
        finally:
            for passage in passages.values():
                passage.set()  # whatever failed: no thread stays behind
    assert [(kind, threads) for kind, _, threads in watcher.seen] == [
        (ThreadAbandoned, 1),
        (ThreadAbandoned, 2),
        (ThreadReturned, 1),
        (ThreadReturned, 0),
    ]
