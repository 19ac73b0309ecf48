"""Counts events, and renders what was counted together with what is so at this moment.

Rules:
1. Everything here runs on the event loop's thread. The one exception are garbage collections, see `pauses`.
2. An event costs a few dictionary look-ups: no strings are built, nothing is counted per station but by a batch's sums.
3. Every type of event is named, also those that count nothing: a new one does not pass mypy unseen.
4. A rendered text is good for half a second: a storm of scrapes costs what two in a second cost.
"""

from __future__ import annotations

from collections import Counter as Tally
from contextlib import asynccontextmanager
from math import inf
from typing import TYPE_CHECKING, Final, assert_never

import trio
from prometheus_client import CollectorRegistry, GCCollector, ProcessCollector

from stationmaster import __version__
from stationmaster.batch import ClosedBy, Outcome
from stationmaster.errors import plain_errors
from stationmaster.events import (
    BatchClosed,
    BatchDropped,
    BatchHandlerTrouble,
    BatchJoined,
    BatchOpened,
    BatchWithdrawn,
    CallAbandoned,
    CallDone,
    CallFailed,
    CallRerouted,
    CallStarted,
    DeadLettersKept,
    EmptyBatch,
    EndpointClosed,
    EndpointOpened,
    EndpointPaused,
    LateResult,
    MessageRefused,
    OffsetsCommitted,
    OutboxDelivered,
    OutboxRejected,
    OutboxRetried,
    PartitionsAssigned,
    PartitionsLost,
    PartitionsRevoked,
    RequestSubmitted,
    ResultHookTrouble,
    SourcePaused,
    SourceRecovered,
    SourceTrouble,
    StateMovedAside,
    StationAnswered,
    StationBreakerClosed,
    StationBreakerOpened,
    StationTrouble,
    StoreBlocked,
    StoreUnblocked,
    ThreadAbandoned,
    ThreadReturned,
    UploadAttempted,
    UploadDone,
    UploadFailed,
    UploadKept,
    UploadRejected,
    UploadRetried,
    UploadsDiverted,
    UploadsResumed,
)
from stationmaster.service.metrics import definitions as d
from stationmaster.service.metrics.instruments import (
    CLASSIC,
    OPEN_METRICS,
    Instruments,
    expose,
    wants_open_metrics,
)
from stationmaster.service.metrics.moments import Moments, MomentsCollector
from stationmaster.service.metrics.pauses import GcPauses, watch_loop
from stationmaster.service.metrics.uncommitted import Uncommitted

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable

    from stationmaster.batch import BatchReport, OffsetRange
    from stationmaster.events import Event

FRESH_S: Final = 0.5
"""A rendered text is good for so long."""
_OUTCOMES: Final = dict(zip(Outcome, d.STATION_OUTCOMES.labels[1].values, strict=True))


class Metrics:
    """An observer that counts, see `stationmaster.abc.Observer`; made by `open_metrics`, or by itself in a test."""

    detailed: Final = False

    def __init__(
        self, *, topics: Iterable[str] = (), clock: Callable[[], float] = trio.current_time
    ) -> None:
        """Begin at 0.

        Args:
            topics: those of the configuration; others begin with their first batch.
            clock: seconds, never back; tells how old things are.
        """
        self.moments: Moments = Moments()
        """Whom to ask at scrape time: to be filled in as the parts open."""
        self.gc_pauses: GcPauses = GcPauses()
        self._clock = clock
        self._uncommitted = Uncommitted()
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        GCCollector(registry=self._registry)
        self._registry.register(self.gc_pauses)
        self._registry.register(MomentsCollector(self.moments, self._oldest_uncommitted_s))
        self._instruments = Instruments(self._registry)
        self._add = self._instruments.add
        self._put = self._instruments.put
        self._note = self._instruments.note
        self._put(d.BUILD_INFO, 1, __version__)
        self._topics: set[str] = set()
        for topic in topics:
            self._begin_topic(topic)
        self._rendered: dict[bool, tuple[float, bytes]] = {}

    def render(self, accept: str | None = None) -> tuple[bytes, str]:
        """Return what Prometheus scrapes, and its content type.

        OpenMetrics if `accept` (the request's header) names it, else the classic text; one of the last half second is
        returned as it is. What a part raises when it is asked does not come out here, see `moments`.
        """
        open_metrics = wants_open_metrics(accept)
        kind = OPEN_METRICS if open_metrics else CLASSIC
        now = self._clock()
        made_at, body = self._rendered.get(open_metrics, (-inf, b""))
        if not now - made_at < FRESH_S:
            body = expose(self._registry, open_metrics=open_metrics)
            self._rendered[open_metrics] = now, body
        return body, kind

    def note_loop_lag(self, seconds: float) -> None:
        """Take note how late a timer of the event loop fired."""
        self._note(d.LOOP_LAG, seconds)

    def _begin_topic(self, topic: str) -> None:
        self._topics.add(topic)
        self._instruments.begin_topic(topic)

    def _oldest_uncommitted_s(self) -> float:
        return self._uncommitted.oldest_age_s(self._clock())

    # ------------------------------------------------------------------------------------------------------- counting

    def observe(self, event: Event, /) -> None:
        """Count it."""
        match event:
            case RequestSubmitted() | StationAnswered():
                pass  # one by one, and only if somebody else wants details: the sums come otherwise
            case CallStarted() | CallDone() | CallFailed() | CallAbandoned():
                self._call(event)
            case BatchOpened() | BatchJoined() | EmptyBatch() | MessageRefused():
                self._arrival(event)
            case BatchClosed(report=report):
                self._closed(report, event.lateness_s)
            case (
                UploadAttempted() | UploadDone() | UploadKept() | UploadRejected() | UploadFailed()
            ):
                self._upload(event)
            case OffsetsCommitted():
                self._add(d.COMMITS)
                self._uncommitted.committed(event.offsets)
            case BatchDropped(batch=batch):
                self._add(d.BATCHES_DROPPED, batch.topic)
            case BatchWithdrawn(batch=batch):
                self._add(d.BATCHES_WITHDRAWN, batch.topic)
            case LateResult():
                self._add(d.LATE_RESULTS)
            case (
                StationTrouble()
                | StationBreakerOpened()
                | StationBreakerClosed()
                | ThreadAbandoned()
                | ThreadReturned()
                | BatchHandlerTrouble()
                | ResultHookTrouble()
            ):
                self._handler(event)
            case UploadRetried() | OutboxRetried():
                pass  # `UploadAttempted` has counted it
            case UploadsDiverted():
                self._put(d.UPLOAD_DIVERTING, 1)
            case UploadsResumed():
                self._put(d.UPLOAD_DIVERTING, 0)
            case (
                OutboxDelivered()
                | OutboxRejected()
                | DeadLettersKept()
                | StoreBlocked()
                | StoreUnblocked()
                | StateMovedAside()
            ):
                self._store(event)
            case (
                PartitionsAssigned()
                | PartitionsRevoked()
                | PartitionsLost()
                | SourceTrouble()
                | SourceRecovered()
                | SourcePaused()
            ):
                self._source(event)
            case CallRerouted():
                self._add(d.CALLS_REROUTED, event.endpoint)
            case EndpointPaused():
                self._add(d.ENDPOINT_PAUSES, event.endpoint)
            case EndpointOpened() | EndpointClosed():
                pass  # the endpoint itself tells its state when it is asked
            case _:
                assert_never(event)

    def _call(self, event: CallStarted | CallDone | CallFailed | CallAbandoned) -> None:
        match event:
            case CallStarted():
                self._add(d.BATCHER_CALLS, event.reason)
                self._note(d.BATCHER_CALL_ROWS, event.rows)
                self._note(d.BATCHER_QUEUE_WAIT, event.oldest_age_s)
            case CallDone():
                self._note(d.BATCHER_CALL_DURATION, event.seconds, "answered")
            case CallFailed():
                self._note(d.BATCHER_CALL_DURATION, event.seconds, "failed")
            case CallAbandoned():
                self._note(d.BATCHER_CALL_DURATION, event.seconds, "abandoned")
            case _:
                assert_never(event)

    def _arrival(self, event: BatchOpened | BatchJoined | EmptyBatch | MessageRefused) -> None:
        match event:
            case BatchOpened(batch=batch):
                if batch.topic not in self._topics:
                    self._begin_topic(batch.topic)
                self._add(d.BATCHES_OPENED, batch.topic)
                self._came(batch.ranges)
            case BatchJoined():
                self._add(d.BATCH_JOINS)
                self._came(event.ranges)
            case EmptyBatch(batch=batch):
                self._add(d.BATCHES_EMPTY, batch.topic)
                self._came(batch.ranges)
            case MessageRefused(record=record):
                self._add(d.DEAD_LETTERS, event.reason)
                self._uncommitted.came(
                    record.topic,
                    record.partition,
                    record.offset,
                    now=self._clock(),
                    generation=record.generation,
                )
            case _:
                assert_never(event)

    def _came(self, ranges: Iterable[OffsetRange]) -> None:
        now = self._clock()
        for one in ranges:
            self._uncommitted.came(
                one.topic, one.partition, one.last, now=now, generation=one.generation
            )

    def _closed(self, report: BatchReport, lateness_s: float) -> None:
        batch, topic = report.batch, report.batch.topic
        self._add(d.BATCHES_CLOSED, topic, report.closed_by.value)
        if report.closed_by is ClosedBy.DEADLINE:
            self._note(d.BATCH_LATENESS, lateness_s, topic)
        for outcome, name in _OUTCOMES.items():
            self._add(d.STATION_OUTCOMES, topic, name, by=report.counts[outcome])
        self._add(d.ENTRIES_DUPLICATE, topic, by=batch.duplicates)
        self._add(d.MESSAGES_MISLABELLED, topic, by=batch.mislabelled)
        self._add(d.BATCH_FOLLOW_UPS, topic, by=batch.follow_up)
        for reason, count in Tally(bad.reason for bad in batch.bad_entries).items():
            self._add(d.ENTRIES_BAD, topic, reason, by=count)

    def _upload(
        self, event: UploadAttempted | UploadDone | UploadKept | UploadRejected | UploadFailed
    ) -> None:
        match event:
            case UploadAttempted():
                route = "outbox" if event.from_outbox else "direct"
                self._add(d.UPLOAD_ATTEMPTS, route, _status_class(event.status))
                self._note(d.UPLOAD_ATTEMPT_DURATION, event.seconds, route)
            case UploadDone(report=report, seconds=seconds):
                topic = report.batch.topic
                self._add(d.BATCHES_UPLOADED, topic)
                self._add(d.UPLOAD_SENT_BYTES, "direct", by=event.sent_bytes)
                self._note(d.UPLOAD_DURATION, seconds, topic)
                self._note(d.BATCH_DURATION, report.duration_s + seconds, topic)
            case UploadKept():
                self._add(d.BATCHES_KEPT)
            case UploadRejected():
                self._add(d.BATCHES_REJECTED, "direct")
                self._add(d.DEAD_LETTERS, "rejected-upload")
            case UploadFailed():
                self._add(d.BATCHES_HOMELESS)
            case _:
                assert_never(event)

    def _handler(
        self,
        event: StationTrouble
        | StationBreakerOpened
        | StationBreakerClosed
        | ThreadAbandoned
        | ThreadReturned
        | BatchHandlerTrouble
        | ResultHookTrouble,
    ) -> None:
        match event:
            case StationTrouble():
                self._add(d.STATION_TROUBLES)
            case StationBreakerOpened():
                self._add(d.STATION_BREAKER_OPENINGS)
                self._add(d.STATION_BREAKERS_OPEN)
            case StationBreakerClosed():
                self._add(d.STATION_BREAKERS_OPEN, by=-1)
            case ThreadAbandoned():
                self._add(d.THREAD_ABANDONMENTS)
                self._put(d.ABANDONED_THREADS, event.abandoned)
            case ThreadReturned():
                self._put(d.ABANDONED_THREADS, event.abandoned)
            case BatchHandlerTrouble():
                self._add(d.BATCH_HANDLER_TROUBLES)
            case ResultHookTrouble():
                self._add(d.RESULT_HOOK_TROUBLES, event.reason)
            case _:
                assert_never(event)

    def _store(
        self,
        event: OutboxDelivered
        | OutboxRejected
        | DeadLettersKept
        | StoreBlocked
        | StoreUnblocked
        | StateMovedAside,
    ) -> None:
        match event:
            case OutboxDelivered():
                self._add(d.OUTBOX_DELIVERED)
                self._add(d.UPLOAD_SENT_BYTES, "outbox", by=event.sent_bytes)
                self._note(d.OUTBOX_WAIT, event.waited_s)
            case OutboxRejected():
                self._add(d.BATCHES_REJECTED, "outbox")
                self._add(d.DEAD_LETTERS, "rejected-upload")
            case DeadLettersKept():
                self._add(d.DEAD_LETTERS_KEPT, by=len(event.letters))
            case StoreBlocked():
                self._add(d.STORE_BLOCKAGES, event.store)
                self._put(d.STORE_BLOCKED, 1, event.store)
            case StoreUnblocked():
                self._put(d.STORE_BLOCKED, 0, event.store)
            case StateMovedAside():
                self._add(d.STATE_MOVED_ASIDE)
            case _:
                assert_never(event)

    def _source(
        self,
        event: PartitionsAssigned
        | PartitionsRevoked
        | PartitionsLost
        | SourceTrouble
        | SourceRecovered
        | SourcePaused,
    ) -> None:
        match event:
            case PartitionsAssigned():
                self._add(d.REBALANCES, "assigned")
                self._uncommitted.assign(event.partitions)
            case PartitionsRevoked():
                self._add(d.REBALANCES, "revoked")
                self._add(d.UNDRAINED_REVOKES, by=not event.drained)
                self._note(d.DRAIN_DURATION, event.drain_s)
                self._uncommitted.leave(event.partitions)
            case PartitionsLost():
                self._add(d.REBALANCES, "lost")
                self._uncommitted.leave(event.partitions)
            case SourceTrouble():
                self._add(d.SOURCE_TROUBLES, event.kind)
                self._put(d.SOURCE_IN_TROUBLE, 1)
            case SourceRecovered():
                self._put(d.SOURCE_IN_TROUBLE, 0)
            case SourcePaused():
                self._put(d.SOURCE_PAUSED, event.paused)
            case _:
                assert_never(event)


def _status_class(status: int | None) -> str:
    return "none" if status is None else f"{status // 100}xx"


@asynccontextmanager
async def open_metrics(*, topics: Iterable[str] = ()) -> AsyncIterator[Metrics]:
    """Open metrics that also measure this process: pauses of the garbage collector and of the event loop.

    `topics`: those of the configuration, which begin at 0. Leaving ends the measuring; what was counted can still be
    rendered.
    """
    metrics = Metrics(topics=topics)
    with metrics.gc_pauses.watched(), plain_errors():
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch_loop, metrics.note_loop_lag, name="loop lag")
            yield metrics
            nursery.cancel_scope.cancel()
