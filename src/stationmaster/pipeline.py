"""The pipeline: joins source, poller, stations, collectors and uploader. `open_pipeline()` is the library's door.

Who owns what (an outer ring outlives the inner ones):

    open_pipeline()     one shield around all rings: what is cancelled from outside is drained within the grace
      station ring      one task, one nursery and one bounded channel per station
        batch ring      one task per batch: waits under its own deadline, snapshot, upload; leaving it IS the drain
                        beside them the one task that keeps dead letters
          poller        started last, stopped first; the fan-out of an opened batch is shielded from its scope

Rules:
1. The batch task is started before the first checkpoint after opening, so an opened batch always has an owner.
2. A batch task waits and uploads under shields of its own: whatever else breaks, it is decided by its deadline and
   delivered within the upload's limit. The upload stands outside the deadline's scope.
3. Every shield has a limit, and one hand on it: `drain(grace_s)` draws all limits in to the end of the grace, what is
   still open then is dropped uncommitted and comes again. `drain(0)` is "stop now".
4. Offsets are accounted for after the delivery, never before. No batch waits for a commit.
5. A batch whose partitions have all left this process is given up: nothing of it could be committed. One that also
   covers partitions that stay goes on, so that these are accounted for; the others' ranges come again elsewhere.
"""

from __future__ import annotations

import math
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import trio

from stationmaster.abc import NullObserver
from stationmaster.batch import Batch
from stationmaster.collector import Collector
from stationmaster.errors import plain_errors
from stationmaster.events import BatchClosed, BatchDropped, BatchOpened, BatchWithdrawn, EmptyBatch
from stationmaster.letters import Letters
from stationmaster.poller import Draft, Intake, Poller
from stationmaster.settings import PipelineSettings, PipelineStatistics
from stationmaster.stations import Stations, open_stations
from stationmaster.uploader import Uploader

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable, Iterator

    from stationmaster.abc import (
        DeadLetters,
        Observer,
        Outbox,
        Sink,
        Source,
        StationHandler,
        Withdrawn,
    )
    from stationmaster.batch import OffsetRange

_SLICE = 32  # stations handed out between two checkpoints: keeps other batches' deadlines within a millisecond


class Pipeline:
    """A running pipeline. Opened by `open_pipeline`."""

    def __init__(
        self,
        source: Source,
        *,
        handler: StationHandler,
        sink: Sink,
        outbox: Outbox | None,
        dead_letters: DeadLetters | None,
        settings: PipelineSettings,
        observer: Observer,
        now: Callable[[], datetime],
    ) -> None:
        self._source = source
        self._handler = handler
        self._settings = settings
        self._observer = observer
        self._now = now
        self._letters = Letters(dead_letters, account=source.account, observer=observer)
        self._uploader = Uploader(
            sink,
            limit_s=settings.upload_timeout_s,
            outbox=outbox,
            bury=self._letters.keep,
            observer=observer,
        )
        self._intake = Intake(slots=settings.max_in_flight, max_bytes=settings.max_in_flight_bytes)
        self._stations: Stations | None = None
        self._polling = trio.CancelScope()
        self._shields: set[trio.CancelScope] = set()
        self._open: dict[Collector, trio.CancelScope | None] = {}
        """Open batches -> the scope of their delivery, if they are decided."""
        self._gone: dict[tuple[str, int], int] = {}
        """Topic and partition -> the newest generation that was taken away."""
        self._end = math.inf  # of the grace, once it has begun
        self._letters_kept = trio.Event()
        self._ending = trio.Event()
        self._finished = trio.Event()
        self._dropped = 0

    # ------------------------------------------------------------------------------------------------------- public

    def drain(self, *, grace_s: float) -> None:
        """Stop polling; open batches may be delivered within `grace_s` seconds from now, then they are dropped.

        May be called again: the earliest end counts. 0 stops now. Returns at once; `wait_finished` waits.
        """
        self._polling.cancel()
        self._draw_in(trio.current_time() + grace_s)

    async def wait_finished(self) -> None:
        """Wait until nothing is open any more: the source is at its end, or the pipeline was drained."""
        await self._finished.wait()

    async def wait_ending(self) -> None:
        """Wait until it begins to end: drained, cancelled, broken, or with nothing left to do.

        From then on it takes `grace_s` at most, unless a handler cannot be cancelled.
        """
        await self._ending.wait()

    @property
    def dropped(self) -> int:
        """Batches that the end of the grace dropped uncommitted."""
        return self._dropped

    def statistics(self) -> PipelineStatistics:
        """Return a moment of the pipeline."""
        return PipelineStatistics(
            in_flight=self._intake.in_flight,
            in_flight_bytes=self._intake.in_flight_bytes,
            live_stations=0 if self._stations is None else len(self._stations),
            draining=self._polling.cancel_called,
            blocked=tuple(
                name
                for name, part in (("outbox", self._uploader), ("dead-letters", self._letters))
                if part.is_blocked
            ),
        )

    # ----------------------------------------------------------------------------------------------------- the rings

    async def _run(self) -> None:
        """Run the rings to their end, or to the end of the grace."""
        async with trio.open_nursery() as around:
            around.start_soon(self._drain_when_cancelled, name="cancellation watch")
            with self._shielded(until=math.inf):
                await self._run_rings()
            self._finished.set()
            around.cancel_scope.cancel()

    async def _drain_when_cancelled(self) -> None:
        """Turn a cancellation from outside into a drain: the stations go on, so that no batch is uploaded half."""
        try:
            await trio.sleep_forever()
        finally:
            if not self._finished.is_set():
                self.drain(grace_s=self._settings.grace_s)

    async def _run_rings(self) -> None:
        settings = self._settings
        async with open_stations(
            self._handler,
            queue_capacity=settings.queue_capacity,
            max_live=settings.max_live,
            idle_s=settings.idle_s,
            result_bytes=settings.result_bytes,
            on_eased=self._intake.nudge,
            on_crash=self._drop_incomplete,
            observer=self._observer,
        ) as self._stations:
            async with trio.open_nursery() as batches:
                stations = self._stations

                async def open_batch(draft: Draft) -> None:
                    await self._open_batch(draft, stations, batches)

                poller = Poller(
                    self._source,
                    self._intake,
                    by=settings.by,
                    group_id=settings.group_id,
                    limits=settings.limits,
                    may_open=self._may_open,
                    open_batch=open_batch,
                    refuse=self._letters.refuse,
                )
                batches.start_soon(self._keep_letters, name="dead letters")
                self._source.watch_withdrawals(self._withdraw)
                try:
                    try:
                        with self._polling:
                            await poller.run()
                    finally:
                        self._letters.close()
                    await self._intake.wait_idle()
                    await self._letters_kept.wait()
                    self._ending.set()
                except trio.Cancelled:
                    # A batch or a station ended in a bug. The batch tasks go on under their shields: give them an end.
                    self._draw_in(trio.current_time() + settings.grace_s)
                    raise

    def _may_open(self, draft: Draft) -> bool:
        assert self._stations is not None  # noqa: S101 - the poller runs inside the station ring
        return self._stations.expected_wait_s(draft.entries) < self._settings.deadline_s / 2

    async def _open_batch(self, draft: Draft, stations: Stations, batches: trio.Nursery) -> None:
        """Open a draft: its deadline begins, its task starts, its stations get their jobs."""
        if self._is_withdrawn(draft.ranges):
            await trio.lowlevel.checkpoint()
            return
        opened = trio.current_time()
        batch = Batch(
            batch_id=draft.batch_id,
            topic=draft.topic,
            opened_at=self._now(),
            deadline=opened + self._settings.deadline_s,
            ranges=draft.ranges,
            entries=draft.entries,
            last_message=draft.last_message,
            bad_entries=draft.bad_entries,
            mislabelled=draft.mislabelled,
            size_bytes=draft.size_bytes,
        )
        if not batch.entries and not self._settings.upload_empty:
            self._observer.observe(EmptyBatch(batch=batch))
            self._account(batch)
            await trio.lowlevel.checkpoint()
            return
        collector = Collector(
            batch,
            opened=opened,
            quorum=self._settings.quorum,
            report_bytes=self._settings.report_bytes,
            observer=self._observer,
        )
        self._observer.observe(BatchOpened(batch=batch, in_flight=self._intake.in_flight + 1))
        self._intake.enter(batch.size_bytes)
        self._open[collector] = None
        batches.start_soon(self._run_batch, collector, name=f"batch {batch.batch_id}")
        with self._shielded(until=batch.deadline):
            await trio.lowlevel.checkpoint()
            for index, station_id in enumerate(batch.entries, 1):
                stations.submit(collector, station_id)
                if not index % _SLICE:
                    await trio.lowlevel.checkpoint()

    async def _run_batch(self, collector: Collector) -> None:
        """Own one batch from its opening to its end."""
        batch = collector.batch
        try:
            with self._shielded(until=collector.deadline):
                await collector.done.wait()
            now = trio.current_time()
            if collector.closed or now >= self._end:
                # Even if it is complete: its stations are cancelled too, their errors are no answers.
                self._drop(collector)
                return
            report = collector.close(closed_at=self._now())
            self._observer.observe(
                BatchClosed(report=report, lateness_s=max(0.0, now - collector.deadline))
            )
            delivered = False
            with self._shielded(until=math.inf) as scope:  # the uploader keeps limits of its own
                self._open[collector] = scope
                await self._uploader.deliver(report)
                delivered = True
            if delivered:
                self._account(batch)
            else:
                self._drop(collector)
        finally:
            del self._open[collector]
            self._intake.leave(batch.size_bytes)

    async def _keep_letters(self) -> None:
        with self._shielded(until=math.inf):
            await self._letters.run()
        self._letters_kept.set()

    def _account(self, batch: Batch) -> None:
        for offsets in batch.ranges:
            self._source.account(offsets)

    def _drop_incomplete(self) -> None:
        """The stations die of a bug: a batch that still waits for answers would be uploaded half."""
        for collector, delivery in self._open.items():
            if delivery is None and not collector.done.is_set():
                collector.drop()

    def _withdraw(self, gone: Withdrawn) -> None:
        """Partitions were taken away: give up what nobody could commit, its slots are wanted."""
        for topic, partition, generation in gone:
            self._gone[topic, partition] = generation
        for collector, delivery in self._open.items():
            if self._is_withdrawn(collector.batch.ranges):
                if delivery is None:
                    collector.drop()
                else:
                    delivery.cancel()

    def _is_withdrawn(self, ranges: Iterable[OffsetRange]) -> bool:
        gone = self._gone
        return all(r.generation <= gone.get((r.topic, r.partition), -1) for r in ranges)

    def _drop(self, collector: Collector) -> None:
        collector.drop()
        if self._is_withdrawn(collector.batch.ranges):
            self._observer.observe(BatchWithdrawn(batch=collector.batch))
        else:
            self._dropped += 1
            self._observer.observe(BatchDropped(batch=collector.batch))

    # -------------------------------------------------------------------------------------------------------- limits

    @contextmanager
    def _shielded(self, *, until: float) -> Iterator[trio.CancelScope]:
        """Shield the block from every cancellation but its own limit and the end of the grace."""
        with trio.CancelScope(shield=True, deadline=min(until, self._end)) as scope:
            self._shields.add(scope)
            try:
                yield scope
            finally:
                self._shields.discard(scope)

    def _draw_in(self, end: float) -> None:
        self._ending.set()
        self._end = min(self._end, end)
        for scope in self._shields:
            scope.deadline = min(scope.deadline, self._end)


def _utc_now() -> datetime:
    return datetime.now(UTC)


@asynccontextmanager
async def open_pipeline(
    source: Source,
    *,
    handler: StationHandler,
    sink: Sink,
    outbox: Outbox | None = None,
    dead_letters: DeadLetters | None = None,
    settings: PipelineSettings | None = None,
    observer: Observer | None = None,
    now: Callable[[], datetime] = _utc_now,
) -> AsyncIterator[Pipeline]:
    """Run batches from a source through a handler to a sink.

    Args:
        source: polled by this pipeline alone; it must outlive it, so that what was uploaded is committed.
        handler: called once per station and batch, see `stationmaster.abc.StationHandler`.
        sink: gets each closed batch, once as long as it accepts.
        outbox: keeps batches that the sink does not take in time, see `stationmaster.state`. Without one, such a
            batch ends the pipeline.
        dead_letters: keeps records that cannot be used and batches that the sink refuses for good. Without it they
            are told to the observer, and their offsets count.
        settings: defaults: one batch per message, 5 s, everybody answers.
        observer: hears what happens.
        now: the wall clock, for `openedAt` and `closedAt` only.

    Leaving the block drains: polling stops, open batches are delivered within `settings.grace_s`, the rest is dropped
    uncommitted. If the block is cancelled or raises, the same holds. `await pipeline.wait_finished()` first to run a
    bounded source to its end.

    Raises:
        UploadFailedError: a batch found no home within `settings.upload_timeout_s`, and there is no outbox; nothing of
            it is committed.
        SourceError: the source cannot go on; the open batches were delivered before.
    """
    settings = settings if settings is not None else PipelineSettings()
    pipeline = Pipeline(
        source,
        handler=handler,
        sink=sink,
        outbox=outbox,
        dead_letters=dead_letters,
        settings=settings,
        observer=observer if observer is not None else NullObserver(),
        now=now,
    )
    with plain_errors():
        async with trio.open_nursery() as ring:
            ring.start_soon(pipeline._run, name="pipeline")  # noqa: SLF001 - its own module
            yield pipeline
            pipeline.drain(grace_s=settings.grace_s)
