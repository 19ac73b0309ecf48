"""What is told does not depend on when it happens: the same scene, at the start of the clock and long after it.

A test that begins at 0 cannot tell `now - began` from `now + began`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs
import trio
from trio.testing import MockClock

from stationmaster.events import (
    BatchClosed,
    LateResult,
    OutboxDelivered,
    ResultHookTrouble,
    StationBreakerClosed,
    StationBreakerOpened,
    StoreBlocked,
    StoreUnblocked,
    UploadAttempted,
    UploadDone,
    UploadKept,
    UploadRetried,
    UploadsDiverted,
    UploadsResumed,
)
from stationmaster.pipeline import open_pipeline
from stationmaster.settings import PipelineSettings
from stationmaster.testing import MemoryOutboxRows, MemorySource, RecordingObserver, RecordingSink
from stationmaster.testing.sink import Slow
from tests.simulation.scheduling import seeded_scheduler
from tests.telemetry import message_bytes
from tests.test_letters import Shelf
from tests.test_uploader import report
from tests.test_uploader_outbox import Surroundings, Target

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from stationmaster.abc import UploadAnswer
    from stationmaster.batch import StationInput, StationResult
    from stationmaster.events import Event

LONG_AFTER_S = 4096.0
"""A power of two: sums of it and of halves and quarters of seconds are exact."""


def words(event: Event) -> tuple[object, ...]:
    """Return what an event says, but for moments: an open batch has some."""
    facts: dict[str, Any] = {
        name: round(value, 6) if isinstance(value, float) else value
        for name, value in attrs.asdict(event, recurse=False).items()
        if isinstance(value, float | int | str)
    }
    if isinstance(event, BatchClosed):
        closed = event.report
        facts |= {item.station_id: (item.outcome, item.reason) for item in closed.results}
        facts |= {"duration_s": closed.duration_s, "closed_by": closed.closed_by}
    return type(event), *facts.items()


def scene_at(
    start: float, scene: Callable[[float, RecordingObserver], Awaitable[None]]
) -> list[Event]:
    """Play a scene that begins at this moment; return what was told."""
    observer = RecordingObserver()

    async def main() -> None:
        await trio.sleep(start)
        await scene(start, observer)

    with seeded_scheduler(7):
        trio.run(main, clock=MockClock(autojump_threshold=0))
    return observer.events


async def a_pipeline(start: float, observer: RecordingObserver) -> None:
    """One station is ill for a while, one has too much to do; letters find no room at first, the hook is slow."""

    async def handle(station: StationInput) -> Mapping[str, Any]:
        if station.station_id == "ill" and trio.current_time() < start + 14:
            await trio.sleep_forever()
        if station.station_id == "stubborn" and station.batch_id == "air_0_1_0":
            with trio.CancelScope(shield=True):
                await trio.sleep(2.25)
            return {}
        if station.station_id == "busy":
            hangs = station.batch_id == "wind_0_4_0"
            await trio.sleep(8.0 if hangs else 0.5 + 0.25 * (station.message.offset % 2))
        await trio.sleep(0.25)
        return {}

    async def on_result(station: StationInput, result: StationResult) -> None:
        await trio.sleep(3.0 if station.batch_id == "air_0_3_0" else 0.25)

    source = MemorySource()
    async with open_pipeline(
        source,
        handler=handle,
        sink=RecordingSink(otherwise=Slow(0.5)),
        dead_letters=Shelf(opens=start + 6, lasts_s=0.25),
        settings=PipelineSettings(deadline_s=2.0, breaker_failures=2, breaker_probe_s=4.0),
        observer=observer,
        on_result=on_result,
    ) as pipeline:
        for number in range(24):
            source.put("air", 0, message_bytes("well", "ill", "stubborn"))
            if number == 3:
                source.put("air", 1, b"poison")
            if number in {8, 12}:
                for _ in range(6):
                    source.put("wind", 0, message_bytes("busy", "well"))
            await trio.sleep(1.0)
        source.end()
        await pipeline.wait_finished()


@attrs.define(eq=False)
class SlowTarget(Target):
    async def send(self, batch_id: str, body: bytes, /) -> UploadAnswer:  # type: ignore[explicit-override]
        await trio.sleep(0.25)
        return await super().send(batch_id, body)


async def an_outage(start: float, observer: RecordingObserver) -> None:
    """The target is down for a minute, and the outbox has room for one batch."""
    around = Surroundings(
        SlowTarget(up_at=start + 64), rows=MemoryOutboxRows(max_bytes=100), observer=observer
    )
    async with around.open(failures=6) as outbox, trio.open_nursery() as nursery:
        uploader = around.uploader(outbox, limit_s=8.0)
        for offset in range(3):
            nursery.start_soon(uploader.deliver, report(offset))
        await trio.sleep(200)
        await uploader.deliver(report(3))


def test_what_a_pipeline_tells_is_the_same_whenever_it_runs() -> None:
    first, later = scene_at(0.0, a_pipeline), scene_at(LONG_AFTER_S, a_pipeline)
    assert [words(event) for event in later] == [words(event) for event in first]
    rejected = [words(event) for event in first if "cannot end in time" in str(words(event))]
    assert rejected
    kinds = {type(event) for event in first}
    seen = {BatchClosed, LateResult, ResultHookTrouble, StationBreakerOpened, StationBreakerClosed}
    assert kinds >= seen | {StoreBlocked, StoreUnblocked, UploadAttempted, UploadDone}


def test_what_an_outage_tells_is_the_same_whenever_it_comes() -> None:
    first, later = scene_at(0.0, an_outage), scene_at(LONG_AFTER_S, an_outage)
    assert [words(event) for event in later] == [words(event) for event in first]
    kinds = {type(event) for event in first}
    seen = {UploadRetried, UploadKept, UploadDone, UploadsDiverted, UploadsResumed}
    assert kinds >= seen | {OutboxDelivered, StoreBlocked, StoreUnblocked, UploadAttempted}
