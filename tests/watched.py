"""A real pipeline that is watched: board, metrics, health and the web server, between a source and a sink in memory."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import attrs
import trio

from stationmaster.events import UploadDone
from stationmaster.pipeline import Pipeline, open_pipeline
from stationmaster.service.app import Observers
from stationmaster.service.health import Health
from stationmaster.service.metrics import Metrics
from stationmaster.service.status import StatusBoard
from stationmaster.service.web import open_web
from stationmaster.settings import PipelineSettings, TopicSettings
from stationmaster.testing import MemorySource, RecordingSink
from tests.telemetry import message_bytes

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping, Sequence

    from stationmaster.abc import StationHandler
    from stationmaster.batch import StationInput
    from stationmaster.events import Event


async def by_kind(station: StationInput) -> Mapping[str, Any] | None:
    """Do what the station's reading asks for."""
    match station.readings[-1].get("do"):
        case "fail":
            raise ValueError("this sensor is broken")
        case "hang":
            await trio.sleep_forever()
        case "nothing":
            await trio.lowlevel.checkpoint()
            return None
        case _:
            await trio.lowlevel.checkpoint()
    return {"fine": True}


@attrs.define(eq=False)
class Uploads:
    """Hears of the first upload."""

    first: trio.Event = attrs.field(factory=trio.Event)
    detailed: bool = False

    def observe(self, event: Event, /) -> None:
        if isinstance(event, UploadDone):
            self.first.set()


@attrs.define(eq=False, kw_only=True)
class Watched:
    """A running pipeline and where it can be looked at."""

    url: str
    source: MemorySource
    board: StatusBoard
    health: Health
    metrics: Metrics
    pipeline: Pipeline
    uploads: Uploads

    def send(self, *stations: str, topic: str = "air", **do: Sequence[str]) -> None:
        """Let a message of these stations come in; `fail=["S2"]` and the like say what becomes of whom."""
        kinds = {name: kind for kind, names in do.items() for name in names}
        self.source.put(
            topic,
            0,
            message_bytes(*({"stationId": name, "do": kinds.get(name, "")} for name in stations)),
        )


@asynccontextmanager
async def open_watched(
    *,
    token: str | None = None,
    handler: StationHandler = by_kind,
    deadline_s: float = 2.0,
    sink: RecordingSink | None = None,
    **web: Any,
) -> AsyncIterator[Watched]:
    """Open everything; `web` goes to `open_web`. Batches of topic "slow" stay open while a station of them hangs."""
    source, health, metrics, uploads = MemorySource(), Health(), Metrics(), Uploads()
    board = StatusBoard(max_batch_rows=32, max_in_flight=64)
    board.watch(health=health)
    async with (
        trio.open_nursery() as nursery,
        open_web(
            host="127.0.0.1",
            port=0,
            token=token,
            health=health,
            metrics=metrics,
            board=board,
            **web,
        ) as url,
    ):
        nursery.start_soon(health.run)
        async with open_pipeline(
            source,
            handler=handler,
            sink=sink or RecordingSink(),
            settings=PipelineSettings(
                deadline_s=deadline_s,
                topics={"slow": TopicSettings(deadline_s=60.0)},
                grace_s=0.1,
                breaker_failures=0,
                idle_s=600.0,
            ),
            observer=Observers((board, metrics, health, uploads)),
        ) as pipeline:
            await pipeline.wait_started()
            board.watch(pipeline=pipeline)
            metrics.moments.pipeline = pipeline.statistics
            health.watch_pipeline(pipeline.statistics)
            yield Watched(
                url=url,
                source=source,
                board=board,
                health=health,
                metrics=metrics,
                pipeline=pipeline,
                uploads=uploads,
            )
            pipeline.drain(grace_s=0)
            nursery.cancel_scope.cancel()
