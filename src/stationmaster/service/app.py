"""The service: joins configuration, source, batcher, handler, sink and pipeline, and answers to signals.

run_service()
  signals               longest; the first drains, the second stops now
    open_batcher()      outlives the stations that wait on it
      source ring       commits to the end; closes last
        sink
          open_pipeline()
"""

from __future__ import annotations

from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING

import attrs
import structlog
import trio

from stationmaster.batch import ClosedBy, Outcome
from stationmaster.batcher import Batcher, BatchPolicy, open_batcher
from stationmaster.embeddings import open_openai_embedder
from stationmaster.errors import ConfigError, plain_errors
from stationmaster.events import (
    BatchClosed,
    BatchDropped,
    EmptyBatch,
    MessageRefused,
    UploadDone,
    UploadRejected,
)
from stationmaster.files import open_file_source
from stationmaster.handlers import EmbedOptions, Resources
from stationmaster.kafka import KafkaSettings, open_kafka_source
from stationmaster.messages import Limits
from stationmaster.pipeline import Pipeline, open_pipeline
from stationmaster.service.handler_loading import open_handler
from stationmaster.service.shutdown import EXIT_CUT_SHORT, EXIT_OK, Shutdown
from stationmaster.settings import PipelineSettings
from stationmaster.sinks import open_http_sink

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from stationmaster.abc import Observer, Source
    from stationmaster.events import Event
    from stationmaster.service.config import Config
    from stationmaster.service.config_rules import Secret


_LAST_RESORT_S = (
    10.0  # after the grace: whatever still hangs then (a client library's thread) is left behind
)


@attrs.frozen
class Observers:
    """Passes each event to several observers."""

    observers: tuple[Observer, ...]

    @property
    def detailed(self) -> bool:
        """Whether one of them is."""
        return any(observer.detailed for observer in self.observers)

    def observe(self, event: Event, /) -> None:
        """Pass it on."""
        for observer in self.observers:
            observer.observe(event)


@attrs.define(eq=False)
class Tally:
    """Counts what happened, for the summary at the end."""

    uploaded: int = 0
    results: int = 0
    rejected: int = 0
    dropped: int = 0
    empty: int = 0
    refused: int = 0
    by_deadline: int = 0
    unsuccessful: dict[Outcome, int] = attrs.field(factory=dict)
    detailed: bool = False

    def observe(self, event: Event, /) -> None:
        """Count it."""
        match event:
            case BatchClosed():
                report = event.report
                self.by_deadline += report.closed_by is ClosedBy.DEADLINE
                for outcome, count in report.counts.items():
                    if outcome is not Outcome.SUCCEEDED:
                        self.unsuccessful[outcome] = self.unsuccessful.get(outcome, 0) + count
            case UploadDone():
                self.uploaded += 1
                self.results += event.report.counts[Outcome.SUCCEEDED]
            case UploadRejected():
                self.rejected += 1
            case BatchDropped():
                self.dropped += 1
            case EmptyBatch():
                self.empty += 1
            case MessageRefused():
                self.refused += 1
            case _:
                pass


async def run_service(config: Config, *, observer: Observer) -> int:
    """Run until the source ends or a signal drains; return the exit code.

    Raises:
        ConfigError: the handler does not exist, or its options are wrong.
        StationmasterError: the pipeline cannot go on; what was delivered is committed.
    """
    shutdown = Shutdown(grace_s=config.shutdown.grace_s)
    pipeline: Pipeline | None = None
    with plain_errors(), shutdown.last_resort:
        async with trio.open_nursery() as signals:
            await signals.start(shutdown.listen)
            signals.start_soon(shutdown.limit_the_end)
            with shutdown.scope:
                async with AsyncExitStack() as rings:
                    resources = Resources(
                        embedder=await _enter_batcher(rings, config, observer),
                        model=config.embeddings.model if config.embeddings else "",
                        options=config.stations.options,
                    )
                    handler = await rings.enter_async_context(
                        open_handler(config.stations.handler, resources)
                    )
                    source = await rings.enter_async_context(_open_source(config, observer))
                    sink = await rings.enter_async_context(
                        open_http_sink(
                            config.upload.url,
                            token=_reveal(config.upload.token),
                            connections=config.upload.connections,
                            compression=config.upload.compression,
                            accepted=frozenset(config.upload.accepted),
                            attempt_timeout_s=config.upload.attempt_timeout_s,
                        )
                    )
                    async with open_pipeline(
                        source,
                        handler=handler,
                        sink=sink,
                        settings=pipeline_settings(config),
                        observer=observer,
                    ) as pipeline:
                        shutdown.watch(pipeline)
                        await pipeline.wait_finished()
            signals.cancel_scope.cancel()
    if pipeline is not None and pipeline.dropped:
        structlog.stdlib.get_logger("stationmaster").warning(
            "cut short", batches=pipeline.dropped, they="come again after the next start"
        )
        return EXIT_CUT_SHORT
    return EXIT_OK


def check_settings(config: Config) -> None:
    """Check what only the parts themselves know about their settings.

    Raises:
        ConfigError: with every fault.
    """
    faults: list[str] = []
    if config.stations.handler == "embed":
        try:
            EmbedOptions.read(config.stations.options)
        except ConfigError as error:
            faults += error.faults
    if config.kafka is not None:
        try:
            KafkaSettings(**attrs.asdict(config.kafka))
        except ConfigError as error:
            faults += error.faults
    if faults:
        raise ConfigError(faults)


def _reveal(secret: Secret | None) -> str | None:
    return secret.reveal() if secret is not None else None


def pipeline_settings(config: Config) -> PipelineSettings:
    """Translate the configuration."""
    batch, stations, limits, upload = config.batch, config.stations, config.limits, config.upload
    return PipelineSettings(
        by=batch.by,
        deadline_s=batch.deadline_s,
        quorum=batch.quorum,
        max_in_flight=batch.max_in_flight,
        max_in_flight_bytes=batch.max_in_flight_bytes,
        queue_capacity=stations.queue_capacity,
        max_live=stations.max_live,
        idle_s=stations.idle_s,
        limits=message_limits(config),
        result_bytes=limits.result_bytes,
        report_bytes=limits.report_bytes,
        upload_timeout_s=upload.timeout_s,
        upload_empty=upload.empty,
        grace_s=config.shutdown.grace_s,
        group_id=config.kafka.group_id if config.kafka else "",
    )


def message_limits(config: Config) -> Limits:
    """Translate the bounds of a message."""
    limits = config.limits
    return Limits(
        message_bytes=limits.message_bytes,
        json_depth=limits.json_depth,
        stations_per_message=limits.stations_per_message,
        station_id_chars=limits.station_id_chars,
        readings_bytes=limits.readings_bytes,
    )


async def _enter_batcher(
    rings: AsyncExitStack, config: Config, observer: Observer
) -> Batcher | None:
    settings = config.embeddings
    if settings is None:
        await trio.lowlevel.checkpoint()
        return None
    embedder = await rings.enter_async_context(
        open_openai_embedder(
            settings.urls[0],
            model=settings.model,
            key=_reveal(settings.key),
            dimensions=settings.dimensions,
            encoding=settings.encoding,
            connections=config.batcher.max_in_flight,
            timeout_s=settings.timeout_s,
        )
    )
    policy = BatchPolicy(**attrs.asdict(config.batcher))
    return await rings.enter_async_context(open_batcher(embedder, policy=policy, observer=observer))


@asynccontextmanager
async def _open_source(config: Config, observer: Observer) -> AsyncIterator[Source]:
    if config.source.kind == "file":
        assert config.file is not None  # noqa: S101 - load_config saw to it
        async with open_file_source(
            config.file.path,
            topic=config.file.topic,
            max_line_bytes=config.limits.message_bytes,
        ) as file_source:
            yield file_source
        return
    assert config.kafka is not None  # noqa: S101 - load_config saw to it
    settings = KafkaSettings(**attrs.asdict(config.kafka))
    async with open_kafka_source(settings, observer=observer) as kafka_source:
        yield kafka_source
