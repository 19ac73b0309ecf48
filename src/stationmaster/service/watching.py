"""Who watches the service for people and machines: metrics, the status board, and the web server that shows both."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import attrs
import structlog
import trio

from stationmaster.kafka import KafkaSource
from stationmaster.service.config import WebConfig
from stationmaster.service.metrics import open_metrics
from stationmaster.service.status import StatusBoard
from stationmaster.service.web import open_web

if TYPE_CHECKING:
    import socket
    from collections.abc import AsyncIterator

    from stationmaster.abc import Source
    from stationmaster.batcher import Batcher
    from stationmaster.embeddings import Endpoints
    from stationmaster.events import Event
    from stationmaster.pipeline import Pipeline
    from stationmaster.service.config import Config
    from stationmaster.service.health import Health
    from stationmaster.service.metrics import Metrics
    from stationmaster.state import State


@attrs.frozen
class Watch:
    """Observers of everything, and the parts they ask as these open. Without a web server there are none."""

    board: StatusBoard | None = None
    metrics: Metrics | None = None
    detailed: bool = attrs.field(default=False, init=False)

    def observe(self, event: Event, /) -> None:
        """Pass it on."""
        if self.board is not None:
            self.board.observe(event)
        if self.metrics is not None:
            self.metrics.observe(event)

    def watch_state(self, state: State) -> None:
        """Ask it from now on."""
        if self.board is not None and self.metrics is not None:
            self.board.watch(state=state.statistics)
            self.metrics.moments.state = state.statistics

    def watch_batcher(self, batcher: Batcher, endpoints: Endpoints) -> None:
        """Ask them from now on."""
        if self.board is not None and self.metrics is not None:
            self.board.watch(batcher=batcher.statistics)
            self.metrics.moments.batcher = batcher.statistics
            self.metrics.moments.endpoints = endpoints.statistics

    def watch_source(self, source: Source) -> None:
        """Ask it from now on, if there is something to ask."""
        if self.board is not None and self.metrics is not None and isinstance(source, KafkaSource):
            self.board.watch(kafka=source.statistics)
            self.metrics.moments.kafka = source.statistics

    def watch_pipeline(self, pipeline: Pipeline) -> None:
        """Ask it from now on."""
        if self.board is not None and self.metrics is not None:
            self.board.watch(pipeline=pipeline)
            self.metrics.moments.pipeline = pipeline.statistics


@asynccontextmanager
async def open_watch(
    config: Config, *, health: Health, sock: socket.socket | None = None
) -> AsyncIterator[Watch]:
    """Watch the service while the block runs, if there is a `[web]` table, or a socket was handed over.

    Raises:
        ConfigError: the address must not be served without a token.
        ListenError: the address is not to be had.
    """
    if config.web is None and sock is None:
        await trio.lowlevel.checkpoint()
        yield Watch()
        return
    web = config.web or WebConfig()
    board = StatusBoard(
        max_batch_rows=config.batcher.max_batch_rows, max_in_flight=config.batch.max_in_flight
    )
    board.watch(health=health)
    async with (
        open_metrics(topics=config.kafka.topics if config.kafka is not None else ()) as metrics,
        open_web(
            host=web.host,
            port=web.port,
            token=web.token.reveal() if web.token is not None else None,
            health=health,
            metrics=metrics,
            board=board,
            sock=sock,
        ) as url,
    ):
        log = structlog.stdlib.get_logger("stationmaster")
        log.info("web listens", url=url)
        yield Watch(board, metrics)
