"""A pipeline between a source and a sink in memory, for tests of how it ends."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import trio

from stationmaster.batch import Outcome
from stationmaster.events import BatchDropped
from stationmaster.pipeline import Pipeline, open_pipeline
from stationmaster.settings import PipelineSettings
from stationmaster.testing import MemorySource, RecordingObserver, RecordingSink
from tests.telemetry import message_bytes

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

    from stationmaster.abc import DeadLetters, Outbox, StationHandler
    from stationmaster.batch import StationInput


async def one_second(station: StationInput) -> Mapping[str, Any]:
    await trio.sleep(1)
    return {}


async def never(station: StationInput) -> None:
    await trio.sleep_forever()


class Setting:
    """A pipeline's surroundings, kept for looking at them after its end."""

    def __init__(self, messages: int, *, sink: RecordingSink | None = None) -> None:
        """Lay `messages` messages ready, each of a station of its own: none waits for another."""
        self.source = MemorySource()
        self.sink = sink or RecordingSink()
        self.observer = RecordingObserver()
        for number in range(messages):
            self.source.put("air", 0, message_bytes(f"S{number}"))

    @asynccontextmanager
    async def open(
        self,
        handler: StationHandler,
        *,
        outbox: Outbox | None = None,
        dead_letters: DeadLetters | None = None,
        **settings: Any,
    ) -> AsyncIterator[Pipeline]:
        async with open_pipeline(
            self.source,
            handler=handler,
            sink=self.sink,
            outbox=outbox,
            dead_letters=dead_letters,
            settings=PipelineSettings(**settings),
            observer=self.observer,
        ) as pipeline:
            yield pipeline

    async def run(self, handler: StationHandler, **settings: Any) -> None:
        async with self.open(handler, **settings) as pipeline:
            await pipeline.wait_finished()

    @property
    def committed(self) -> int:
        return self.source.committed.get(("air", 0), 0)

    def succeeded(self) -> int:
        return sum(report.counts[Outcome.SUCCEEDED] for report in self.sink.reports.values())

    def dropped(self) -> list[str]:
        return [event.batch.batch_id for event in self.observer.of(BatchDropped)]
