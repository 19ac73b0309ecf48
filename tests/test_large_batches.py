"""Large batches: what is left of them goes in slices, so that others have their turn."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import trio

from stationmaster import PipelineSettings, open_pipeline
from stationmaster.abc import Accepted
from stationmaster.testing import MemorySource
from tests.telemetry import message_bytes

if TYPE_CHECKING:
    from stationmaster.abc import Report, UploadAnswer
    from stationmaster.batch import Batch, BatchReport

STATIONS = 5_000


class Counted(dict[str, Any]):
    """An answer; it counts how many of its kind live."""

    alive = 0

    def __init__(self) -> None:
        super().__init__()
        Counted.alive += 1

    def __del__(self) -> None:
        """Count down."""
        Counted.alive -= 1


class Sink:
    """Accepts, and keeps nothing."""

    uploaded = False

    async def upload(self, report: BatchReport, /) -> UploadAnswer:
        await trio.lowlevel.checkpoint()
        self.uploaded = True
        return Accepted()


async def test_a_large_batch_is_freed_in_slices_after_its_offsets_were_accounted_for() -> None:
    async def handle(batch: Batch, report: Report) -> None:
        for station_id in batch.entries:
            report(station_id, Counted())
        await trio.lowlevel.checkpoint()

    source = MemorySource()
    source.put("air", 0, message_bytes(*(f"S{number}" for number in range(STATIONS))))
    source.end()
    sink = Sink()
    alive = []

    async def watch() -> None:
        while not sink.uploaded or Counted.alive:
            if sink.uploaded:
                alive.append((Counted.alive, source.committed))
            await trio.lowlevel.checkpoint()

    settings = PipelineSettings()
    async with (
        trio.open_nursery() as nursery,
        open_pipeline(source, handler=handle, sink=sink, settings=settings) as pipeline,
    ):
        nursery.start_soon(watch)
        await pipeline.wait_finished()
    counts = [count for count, _ in alive]
    assert counts[0] == STATIONS
    assert max(before - after for before, after in pairwise([*counts, 0])) <= 2 * 1024
    assert next(committed for count, committed in alive if count < STATIONS) == {("air", 0): 1}
