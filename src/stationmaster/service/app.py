"""The service: joins configuration, source, batcher, handler, sink and pipeline, and answers to signals.

run_service()
  signals               longest; the first drains, the second stops now
    web ring            metrics, status board and their server: health answers while the rest drains
                        (and around it the tracing: the last spans go out when everything else has ended)
      state file        outbox and dead letters; refused before the group is joined, if it is in use
        open_batcher()  outlives the stations that wait on it
          source ring   commits to the end; closes last
            upload ring the sink's client, and the outbox's deliveries
              open_pipeline()
"""

from __future__ import annotations

import gc
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from typing import TYPE_CHECKING

import attrs
import structlog
import trio

from stationmaster.batch import ClosedBy, Outcome
from stationmaster.batcher import open_batcher
from stationmaster.embeddings import open_endpoints
from stationmaster.errors import plain_errors
from stationmaster.events import (
    BatchClosed,
    BatchDropped,
    EmptyBatch,
    MessageRefused,
    OutboxDelivered,
    UploadDone,
    UploadKept,
    UploadRejected,
)
from stationmaster.files import open_file_source
from stationmaster.handlers import Resources
from stationmaster.kafka import KafkaSource, open_kafka_dead_letters, open_kafka_source
from stationmaster.pipeline import Pipeline, open_pipeline
from stationmaster.service.handler_loading import open_handler, open_hook
from stationmaster.service.health import Health
from stationmaster.service.reload import Reloader
from stationmaster.service.shutdown import EXIT_CUT_SHORT, EXIT_OK, Shutdown
from stationmaster.service.systemd import Manager
from stationmaster.service.tracing import Tracing, open_tracing
from stationmaster.service.translation import batch_policy, kafka_settings, pipeline_settings
from stationmaster.service.watching import Watch, open_watch
from stationmaster.sinks import open_http_sink
from stationmaster.state import open_outbox, open_state

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from stationmaster.abc import DeadLetters, Observer, ResultHook, Source
    from stationmaster.events import Event
    from stationmaster.handlers import TextEmbedder
    from stationmaster.service.config import Config
    from stationmaster.service.config_rules import Secret
    from stationmaster.state import State


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
    kept: int = 0
    """Sent to the outbox."""
    delivered: int = 0
    """Uploaded out of the outbox."""
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
            case UploadKept():
                self.kept += 1
            case OutboxDelivered():
                self.delivered += 1
            case BatchDropped():
                self.dropped += 1
            case EmptyBatch():
                self.empty += 1
            case MessageRefused():
                self.refused += 1
            case _:
                pass


async def run_service(
    config: Config,
    *,
    observer: Observer,
    manager: Manager | None = None,
    reread: Callable[[], Config] | None = None,
) -> int:
    """Run until the source ends or a signal drains; return the exit code.

    At the end of a file what lies in the outbox has `shutdown.grace_s` to go out.

    Args:
        config: what to run.
        observer: hears what happens.
        manager: what systemd handed over; it is told how the service is.
        reread: reads the configuration again at SIGHUP (in a thread); None: SIGHUP is left as it is.

    Raises:
        ConfigError: the handler does not exist, or its options are wrong.
        StationmasterError: the pipeline cannot go on; what was delivered is committed.
    """
    shutdown = Shutdown(grace_s=config.shutdown.grace_s)
    health = Health(
        endpoints=len(config.embeddings.urls) if config.embeddings else 0,
        upload_limit_s=config.upload.timeout_s,
        threads=config.stations.threads,
    )
    health.watch_ending(shutdown.ending.begun)
    observer = Observers((health, observer))
    manager = manager if manager is not None else Manager()
    reloader = Reloader(config=config, manager=manager, ending=shutdown.ending)
    pipeline: Pipeline | None = None
    kept = 0
    with plain_errors(), shutdown.last_resort:
        async with trio.open_nursery() as signals:
            await signals.start(shutdown.listen)
            signals.start_soon(shutdown.limit_the_end)
            signals.start_soon(health.run, name="heartbeat")
            signals.start_soon(manager.run, health, shutdown.ending, name="systemd")
            if reread is not None:
                await signals.start(reloader.listen, reread)
            with shutdown.scope:
                async with AsyncExitStack() as rings:
                    tracing = await rings.enter_async_context(open_tracing(config.tracing))
                    watch = await rings.enter_async_context(
                        open_watch(config, health=health, sock=manager.web_socket)
                    )
                    observer = Observers((watch, *tracing.observers, *observer.observers))
                    state = await rings.enter_async_context(
                        open_state(
                            config.outbox.path,
                            outbox_max_bytes=config.outbox.max_bytes,
                            dead_letters_max_bytes=config.dead_letters.max_bytes,
                            observer=observer,
                        )
                    )
                    health.watch_outbox(lambda: state.statistics().outbox)
                    watch.watch_state(state)
                    resources = Resources(
                        embedder=await _enter_batcher(rings, config, observer, watch, tracing),
                        model=config.embeddings.model if config.embeddings else "",
                        options=config.stations.options,
                    )
                    handler = await rings.enter_async_context(
                        open_handler(config.stations.handler, resources)
                    )
                    on_result: ResultHook | None = None
                    if config.stations.on_result is not None:
                        on_result = await rings.enter_async_context(
                            open_hook(config.stations.on_result, resources)
                        )
                    source = await rings.enter_async_context(_open_source(config, observer))
                    watch.watch_source(source)
                    if isinstance(source, KafkaSource):
                        health.watch_source(source.statistics)
                    dead_letters = await _enter_dead_letters(rings, config, state)
                    sink = await rings.enter_async_context(
                        open_http_sink(
                            config.upload.url,
                            token=_reveal(config.upload.token),
                            connections=config.upload.connections,
                            compression=config.upload.compression,
                            accepted=frozenset(config.upload.accepted),
                            attempt_timeout_s=config.upload.attempt_timeout_s,
                            more_headers=tracing.http_headers,
                        )
                    )
                    outbox = await rings.enter_async_context(
                        open_outbox(
                            state.outbox,
                            send=sink.send,
                            dead_letters=dead_letters,
                            max_backoff_s=config.outbox.max_backoff_s,
                            observer=observer,
                        )
                    )
                    async with open_pipeline(
                        source,
                        handler=tracing.handler(handler),
                        sink=tracing.sink(sink),
                        outbox=outbox,
                        dead_letters=dead_letters,
                        settings=pipeline_settings(config),
                        observer=observer,
                        on_result=on_result,
                    ) as pipeline:
                        shutdown.watch(pipeline)
                        await pipeline.wait_started()
                        health.watch_pipeline(pipeline.statistics)
                        watch.watch_pipeline(pipeline)
                        reloader.watch(pipeline)
                        manager.ready()
                        if config.stations.gc_freeze:
                            rings.enter_context(_spared_collector())
                        await pipeline.wait_finished()
                    if config.source.kind == "file":
                        # Nobody starts this again by himself: let the outbox have its chance.
                        with trio.move_on_after(config.shutdown.grace_s):
                            await trio.lowlevel.checkpoint()
                            while len(state.outbox):
                                await outbox.wait_change()
                    kept = len(state.outbox)
            signals.cancel_scope.cancel()
    log = structlog.stdlib.get_logger("stationmaster")
    if kept:
        log.warning("batches left in the outbox", batches=kept, they="go out after the next start")
    if pipeline is not None and pipeline.dropped:
        log.warning("cut short", batches=pipeline.dropped, they="come again after the next start")
        return EXIT_CUT_SHORT
    return EXIT_CUT_SHORT if kept and config.source.kind == "file" else EXIT_OK


@contextmanager
def _spared_collector() -> Iterator[None]:
    """Take what exists now, modules and known stations, out of garbage collection, and look at the rest less often.

    With 10,000 station tasks a full collection stops everything for 150 ms: batches are late by as much. Young objects
    are still looked at often: where old ones are freed meanwhile there are far more than the threshold says, and what
    failed uploads leave behind would lie around.
    """
    before = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(5_000, 20, 1_000)
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()


def _reveal(secret: Secret | None) -> str | None:
    return secret.reveal() if secret is not None else None


async def _enter_batcher(
    rings: AsyncExitStack, config: Config, observer: Observer, watch: Watch, tracing: Tracing
) -> TextEmbedder | None:
    settings = config.embeddings
    if settings is None:
        await trio.lowlevel.checkpoint()
        return None
    endpoints = await rings.enter_async_context(
        open_endpoints(
            settings.urls,
            model=settings.model,
            api=settings.api,
            key=_reveal(settings.key),
            dimensions=settings.dimensions,
            encoding=settings.encoding,
            max_in_flight=config.batcher.max_in_flight,
            timeout_s=settings.timeout_s,
            breaker_failures=settings.breaker_failures,
            breaker_probe_s=settings.breaker_probe_s,
            observer=observer,
        )
    )
    policy = batch_policy(config, max_rows=endpoints.max_rows, max_tokens=endpoints.max_tokens)
    batcher = await rings.enter_async_context(
        open_batcher(tracing.embedder(endpoints), policy=policy, observer=observer)
    )
    watch.watch_batcher(batcher, endpoints)
    return tracing.batcher(batcher)


async def _enter_dead_letters(rings: AsyncExitStack, config: Config, state: State) -> DeadLetters:
    settings = config.dead_letters
    if settings.kind == "sqlite":
        await trio.lowlevel.checkpoint()
        return state.dead_letters
    assert config.kafka is not None  # noqa: S101 - load_config saw to both
    assert settings.topic is not None  # noqa: S101
    return await rings.enter_async_context(
        open_kafka_dead_letters(kafka_settings(config.kafka), topic=settings.topic)
    )


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
    async with open_kafka_source(kafka_settings(config.kafka), observer=observer) as kafka_source:
        yield kafka_source
