"""A pipeline with a station that is stuck: what it costs, and when the station is back."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest
import trio
from trio.testing import MockClock

from stationmaster.batch import ClosedBy, Outcome
from stationmaster.events import BatchClosed, StationBreakerClosed, StationBreakerOpened
from stationmaster.pipeline import open_pipeline
from stationmaster.settings import PipelineSettings
from stationmaster.testing import MemorySource, RecordingSink
from tests.telemetry import message_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping

    from stationmaster.abc import StationHandler
    from stationmaster.batch import BatchReport, StationInput
    from stationmaster.events import Event

STATIONS = [f"S{number:03}" for number in range(100)]
SECONDS = 0.2  # of a healthy job: 5 batches/s is what 100 stations can do
SLOTS = 8  # so that nothing but stuck batches could do 8 / 5 s = 1.6 batches/s


def stuck_at(stuck: str | None, *, until: float = math.inf) -> StationHandler:
    async def handle(station: StationInput) -> Mapping[str, Any]:
        if station.station_id == stuck:
            await trio.sleep_until(until)
        await trio.sleep(SECONDS)
        return {}

    return handle


def throughput(handler: StationHandler, *, batches: int = 400, **settings: Any) -> float:
    """Return batches per second of virtual time."""
    source, sink = MemorySource(), RecordingSink()
    for _ in range(batches):
        source.put("air", 0, message_bytes(*STATIONS))
    source.end()

    async def main() -> float:
        async with open_pipeline(
            source,
            handler=handler,
            sink=sink,
            settings=PipelineSettings(max_in_flight=SLOTS, **settings),
        ) as pipeline:
            await pipeline.wait_finished()
            return trio.current_time()

    took_s = trio.run(main, clock=MockClock(autojump_threshold=0))
    assert len(sink.reports) == batches
    return batches / took_s


def test_one_of_a_hundred_stations_stuck_for_ever_leaves_more_than_four_fifths_of_the_throughput() -> (
    None
):
    undisturbed = throughput(stuck_at(None), batches=100)
    assert undisturbed == pytest.approx(5.0, rel=0.01)
    assert throughput(stuck_at("S050")) > 0.8 * undisturbed
    assert throughput(stuck_at("S050"), batches=50, breaker_failures=0) < 0.4 * undisturbed


async def test_a_station_that_heals_is_back_within_one_probe(autojump_clock: MockClock) -> None:
    healed_at, probe_s = 61.0, 10.0
    source, sink = MemorySource(), RecordingSink()
    back: list[float] = []
    reports: list[BatchReport] = []
    breaker: list[Event] = []

    class Watching:
        detailed = False

        def observe(self, event: Event, /) -> None:
            if isinstance(event, StationBreakerOpened | StationBreakerClosed):
                breaker.append(event)
            if isinstance(event, BatchClosed):
                reports.append(event.report)
                outcomes = {one.station_id: one.outcome for one in event.report.results}
                if outcomes["S007"] is Outcome.SUCCEEDED:
                    back.append(trio.current_time())

    async with open_pipeline(
        source,
        handler=stuck_at("S007", until=healed_at),
        sink=sink,
        settings=PipelineSettings(breaker_probe_s=probe_s),
        observer=Watching(),
    ) as pipeline:
        for _ in range(200):
            source.put("air", 0, message_bytes(*STATIONS[:10]))
            await trio.sleep(0.5)
        source.end()
        await pipeline.wait_finished()

    assert healed_at < back[0] <= healed_at + probe_s + SECONDS + 0.5
    assert [type(event) for event in breaker] == [StationBreakerOpened, StationBreakerClosed]
    late = [report for report in reports if report.closed_by is ClosedBy.DEADLINE]
    # Before it opened, some batches in flight; then one probe every 15 s.
    assert len(late) < 20
    after = [report for report in reports if report.batch.deadline - 5.0 > back[0]]
    assert after
    assert all(report.counts[Outcome.SUCCEEDED] == 10 for report in after)
