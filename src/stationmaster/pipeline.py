"""The pipeline: joins source, poller, workers, batches and uploader. `open_pipeline()` is the library's door.

Who owns what (an outer ring outlives the inner ones):

    open_pipeline()     one shield around all rings: what is cancelled from outside is drained within the grace
      worker ring       those who run the handler: one task, one nursery and one bounded channel per station
        batch ring      one task per batch: waits under its own deadline, snapshot, upload; leaving it IS the drain
                        beside them the one task that keeps dead letters
          poller        started last, stopped first; the fan-out of an opened batch is shielded from its scope

Rules:
1. Every shield has a limit, and one hand on it: `drain(grace_s)` draws all limits in to the end of the grace, what is
   still open then is dropped uncommitted and comes again. `drain(0)` is "stop now".
2. What a batch task may count on stands in `batch_ring`; when a draft is opened, in `poller`.
"""

from __future__ import annotations

import math
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import trio

from stationmaster.abc import NullObserver
from stationmaster.batch_ring import BatchRing
from stationmaster.counting import Counting
from stationmaster.errors import ConfigError, plain_errors
from stationmaster.grace import Grace
from stationmaster.intake import Intake
from stationmaster.letters import Letters
from stationmaster.poller import Poller
from stationmaster.settings import PipelineSettings, PipelineStatistics
from stationmaster.uploader import Uploader
from stationmaster.workers import open_workers

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from stationmaster.abc import DeadLetters, Handler, Observer, Outbox, ResultHook, Sink, Source
    from stationmaster.drafts import Draft
    from stationmaster.settings import OpenBatchStatistics
    from stationmaster.workers import Workers


class Pipeline:
    """A running pipeline. Opened by `open_pipeline`."""

    def __init__(
        self,
        source: Source,
        *,
        handler: Handler,
        on_result: ResultHook | None,
        sink: Sink,
        outbox: Outbox | None,
        dead_letters: DeadLetters | None,
        settings: PipelineSettings,
        observer: Observer,
        now: Callable[[], datetime],
    ) -> None:
        self._source = source
        self._handler = handler
        self._on_result = on_result
        self._settings = settings
        self._observer = Counting(observer)
        self._grace = Grace()
        self._intake = Intake(slots=settings.max_in_flight, max_bytes=settings.max_in_flight_bytes)
        self._letters = Letters(dead_letters, account=source.account, observer=self._observer)
        self._uploader = Uploader(
            sink,
            limit_s=settings.upload_timeout_s,
            outbox=outbox,
            bury=self._letters.keep,
            observer=self._observer,
        )
        self._batches = BatchRing(
            source,
            intake=self._intake,
            grace=self._grace,
            uploader=self._uploader,
            settings=settings,
            observer=self._observer,
            now=now,
        )
        self._workers: Workers | None = None
        self._poller: Poller | None = None
        self._polling = trio.CancelScope()
        self._letters_kept = trio.Event()
        self._started = trio.Event()
        self._finished = trio.Event()

    # ------------------------------------------------------------------------------------------------------- public

    def drain(self, *, grace_s: float) -> None:
        """Stop polling; open batches may be delivered within `grace_s` seconds from now, then they are dropped.

        May be called again: the earliest end counts. 0 stops now. Returns at once; `wait_finished` waits.
        """
        self._polling.cancel()
        self._grace.draw_in(trio.current_time() + grace_s)

    def reconfigure(self, settings: PipelineSettings) -> None:
        """Go by other deadlines, quorums, priorities and rosters; open batches and what was polled keep theirs.

        Raises:
            ConfigError: something else differs too, see `PipelineSettings.fixed_changes`; nothing has changed.
        """
        if fixed := self._settings.fixed_changes(settings):
            raise ConfigError([f"{name}: cannot change while the pipeline runs" for name in fixed])
        self._settings = settings
        self._batches.reconfigure(settings)
        if self._poller is not None:
            self._poller.reconfigure(settings)

    async def wait_started(self) -> None:
        """Wait until the workers are there, those of rosters included, and polling begins.

        If it cannot start, what broke cancels this.
        """
        await self._started.wait()

    async def wait_finished(self) -> None:
        """Wait until nothing is open any more: the source is at its end, or the pipeline was drained."""
        await self._finished.wait()

    async def wait_ending(self) -> None:
        """Wait until it begins to end: drained, cancelled, broken, or with nothing left to do.

        From then on it takes `grace_s` at most, unless a handler cannot be cancelled. A source that breaks ends it
        without haste: open batches keep their own deadlines and limits, and only then this returns.
        """
        await self._grace.begun.wait()

    @property
    def dropped(self) -> int:
        """Batches that the end of the grace dropped uncommitted."""
        return self._batches.dropped

    def statistics(self) -> PipelineStatistics:
        """Return a moment of the pipeline."""
        counted = self._observer
        return PipelineStatistics(
            in_flight=self._intake.in_flight,
            in_flight_bytes=self._intake.in_flight_bytes,
            live_stations=0 if self._workers is None else len(self._workers),
            draining=self._polling.cancel_called,
            blocked=tuple(
                name
                for name, part in (("outbox", self._uploader), ("dead-letters", self._letters))
                if part.is_blocked
            ),
            parked_bytes=0 if self._poller is None else self._poller.parked_bytes,
            late_results=counted.late_results,
            missing=counted.missing,
            joined=counted.joined,
            follow_ups=counted.follow_ups,
            duplicates=counted.duplicates,
            abandoned_threads=counted.abandoned_threads,
            open_breakers=counted.open_breakers,
            oldest_deadline=self._batches.oldest_deadline,
        )

    def open_batches(self, *, limit: int) -> tuple[OpenBatchStatistics, ...]:
        """Return a moment of the open batches, at most `limit` of them: those whose deadline is nearest, first."""
        return self._batches.statistics(limit=limit)

    # ----------------------------------------------------------------------------------------------------- the rings

    async def _run(self) -> None:
        """Run the rings to their end, or to the end of the grace."""
        async with trio.open_nursery() as around:
            around.start_soon(self._drain_when_cancelled, name="cancellation watch")
            with self._grace.shielded():
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
        settings, batches = self._settings, self._batches
        async with open_workers(
            self._handler,
            settings=settings,
            on_result=self._on_result,
            on_eased=self._intake.ease,
            on_crash=batches.drop_incomplete,
            observer=self._observer,
        ) as workers:
            self._workers = workers
            async with trio.open_nursery() as tasks:

                async def open_batch(draft: Draft) -> None:
                    await batches.open_batch(draft, workers, tasks)

                def may_open(draft: Draft) -> bool:
                    limit = self._settings.rules(draft.topic).deadline_s / 2
                    return workers.expected_wait_s(draft.station_ids, topic=draft.topic) < limit

                self._poller = Poller(
                    self._source,
                    self._intake,
                    settings=self._settings,
                    may_open=may_open,
                    may_join=batches.may_join,
                    open_batch=open_batch,
                    refuse=self._letters.refuse,
                    until_pollable=self._letters.until_pollable,
                )
                # First what may fail, a source of somebody's own: the task for letters ends when it is told to only.
                self._source.watch_withdrawals(batches.withdraw, on_leaving=self._poller.give_back)
                tasks.start_soon(self._keep_letters, name="dead letters")
                self._started.set()
                try:
                    try:
                        with self._polling:
                            await self._poller.run()
                    finally:
                        self._letters.close()
                    await self._intake.wait_idle()
                    await self._letters_kept.wait()
                    self._grace.begun.set()
                finally:
                    # Asked is the state: the source may have broken in the very tick of the cancellation.
                    if trio.current_effective_deadline() == -math.inf:
                        # A batch or a worker ended in a bug; batch tasks go on under their shields: give them an end.
                        self._grace.draw_in(trio.current_time() + settings.grace_s)

    async def _keep_letters(self) -> None:
        with self._grace.shielded():
            await self._letters.run()
        self._letters_kept.set()


def _utc_now() -> datetime:
    return datetime.now(UTC)


@asynccontextmanager
async def open_pipeline(
    source: Source,
    *,
    handler: Handler,
    sink: Sink,
    outbox: Outbox | None = None,
    dead_letters: DeadLetters | None = None,
    settings: PipelineSettings | None = None,
    observer: Observer | None = None,
    on_result: ResultHook | None = None,
    now: Callable[[], datetime] = _utc_now,
) -> AsyncIterator[Pipeline]:
    """Run batches from a source through a handler to a sink.

    Args:
        source: polled by this pipeline alone; it must outlive it, so that what was uploaded is committed.
        handler: called once per station and batch, or once per batch, see `stationmaster.abc.Handler`.
        sink: gets each closed batch, once as long as it accepts.
        outbox: keeps batches that the sink does not take in time, see `stationmaster.state`. Without one, such a
            batch ends the pipeline.
        dead_letters: keeps records that cannot be used and batches that the sink refuses for good. Without it they
            are told to the observer, and their offsets count.
        settings: defaults: one batch per message, 5 s, everybody answers.
        observer: hears what happens.
        on_result: hears each station's outcome, see `stationmaster.result_hook`.
        now: the wall clock, for `openedAt` and `closedAt` only.

    Leaving the block drains: polling stops, open batches are delivered within `settings.grace_s`, the rest is dropped
    uncommitted. If the block is cancelled or raises, the same holds. `await pipeline.wait_finished()` first to run a
    bounded source to its end.

    Raises:
        TypeError: the handler is of no kind that is known, the hook is none, or the outbox is the table of one.
        UploadFailedError: a batch found no home within `settings.upload_timeout_s`, and there is no outbox; nothing of
            it is committed.
        SourceError: the source cannot go on; the open batches were delivered before.
    """
    if outbox is not None and not hasattr(outbox, "is_diverting"):
        raise TypeError(
            f"{type(outbox).__name__} is no `stationmaster.abc.Outbox`, which knows whether the target is down; "
            "of the table of a state file `stationmaster.state.open_outbox` makes one"
        )
    settings = settings if settings is not None else PipelineSettings()
    pipeline = Pipeline(
        source,
        handler=handler,
        on_result=on_result,
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
