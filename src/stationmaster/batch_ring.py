"""The batch ring: one task per open batch, from its opening to its delivery.

Rules:
1. The batch task is started before the first checkpoint after opening, so an opened batch always has an owner.
2. A batch task waits and uploads under shields of its own: whatever else breaks, it is decided by its deadline and
   delivered within the upload's limit. The upload stands outside the deadline's scope.
3. Offsets are accounted for after the delivery, never before. No batch waits for a commit.
4. A batch whose partitions have all left this process is given up: nothing of it could be committed. One that also
   covers partitions that stay goes on, so that these are accounted for; the others' ranges come again elsewhere.
5. The fan-out of an opened batch is shielded from the poller's scope: half of a batch must not be handed out.
6. What joins an open batch is part of it from the same step on: of its ranges, its bytes, its report.
7. A large batch is freed in slices: to free 10,000 stations' data at once makes other batches 6 ms late.
"""

from __future__ import annotations

import heapq
from math import inf
from typing import TYPE_CHECKING

import attrs
import trio

from stationmaster.batch import Batch
from stationmaster.collector import Collector
from stationmaster.events import (
    BatchClosed,
    BatchDropped,
    BatchJoined,
    BatchOpened,
    BatchWithdrawn,
    EmptyBatch,
)
from stationmaster.gatherings import Gatherings
from stationmaster.settings import OpenBatchStatistics

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from datetime import datetime

    from stationmaster.abc import Observer, Source, Withdrawn
    from stationmaster.batch import OffsetRange
    from stationmaster.drafts import Draft
    from stationmaster.grace import Grace
    from stationmaster.intake import Intake
    from stationmaster.settings import PipelineSettings
    from stationmaster.uploader import Uploader
    from stationmaster.workers import Workers


# Results, or stations' readings, freed between two checkpoints: a third of a millisecond.
_SLICE = 1024


@attrs.define(eq=False, kw_only=True)
class OpenBatch:
    """One open batch."""

    draft: Draft
    collector: Collector
    delivery: trio.CancelScope | None = None
    """Of its upload, once it is decided."""
    grew: bool = False

    def takes(self, station_ids: Iterable[str]) -> bool:
        """Tell whether data of these stations may join, see `Collector.takes`."""
        return self.collector.takes(station_ids)

    def settle_batch(self) -> None:
        """Write into the batch what it became when others joined. Its tables have grown already."""
        if self.grew:
            draft, collector = self.draft, self.collector
            collector.batch = attrs.evolve(
                collector.batch,
                batch_id=draft.batch_id,
                ranges=draft.ranges,
                bad_entries=draft.bad_entries,
                mislabelled=draft.mislabelled,
                duplicates=draft.duplicates,
                size_bytes=draft.size_bytes,
                traceparents=tuple(draft.traceparents),
            )


class BatchRing:
    """The open batches of a pipeline. Their tasks run in a nursery that outlives the poller."""

    def __init__(
        self,
        source: Source,
        *,
        intake: Intake,
        grace: Grace,
        uploader: Uploader,
        settings: PipelineSettings,
        observer: Observer,
        now: Callable[[], datetime],
    ) -> None:
        """Join the ring to its neighbours.

        Args:
            source: is told what is accounted for.
            intake: slots and bytes.
            grace: hands out the shields.
            uploader: delivers reports.
            settings: how batches are timed and bounded.
            observer: hears what becomes of each.
            now: the wall clock.
        """
        self._source = source
        self._intake = intake
        self._grace = grace
        self._uploader = uploader
        self._settings = settings
        self._observer = observer
        self._now = now
        self._open: set[OpenBatch] = set()
        self._gatherings: Gatherings[OpenBatch] = Gatherings()
        self._gone: dict[tuple[str, int], int] = {}
        """Topic and partition -> the newest generation that was taken away."""
        self.dropped: int = 0
        """Batches that the end of the grace dropped uncommitted."""

    def statistics(self, *, limit: int) -> tuple[OpenBatchStatistics, ...]:
        """Return a moment of the open batches, at most `limit` of them: those whose deadline is nearest."""
        nearest = heapq.nsmallest(limit, self._open, key=_urgency)
        return tuple(
            OpenBatchStatistics(
                batch_id=opened.collector.batch.batch_id,
                topic=opened.draft.topic,
                opened=opened.collector.opened,
                deadline=opened.collector.deadline,
                answered=opened.collector.answered,
                expected=opened.collector.expected,
                delivering=opened.delivery is not None,
            )
            for opened in nearest
        )

    @property
    def oldest_deadline(self) -> float:
        """The earliest deadline of what is open, uploads included; infinity if nothing is."""
        return min((opened.collector.deadline for opened in self._open), default=inf)

    def reconfigure(self, settings: PipelineSettings) -> None:
        """Go by other rules from the next batch on."""
        self._settings = settings

    # ---------------------------------------------------------------------------------------------------------- opening

    def may_join(self, draft: Draft) -> bool:
        """Tell whether an open batch would take this draft."""
        return self._place_for(draft) is not None

    async def open_batch(self, draft: Draft, workers: Workers, tasks: trio.Nursery) -> None:
        """Open a draft, or let it join: then its stations have their jobs, and the batch a deadline and a task.

        Args:
            draft: with room for it.
            workers: get its stations' jobs.
            tasks: where the batch's task runs.
        """
        if self._is_withdrawn(draft.ranges):
            await trio.lowlevel.checkpoint()
            return
        if not draft.station_ids and not self._settings.upload_empty:
            batch = self._make_batch(draft, deadline=trio.current_time(), follow_up=False)
            self._observer.observe(EmptyBatch(batch=batch))
            self._account(draft)
            await trio.lowlevel.checkpoint()
            return
        place = self._place_for(draft)
        if place is not None:
            fresh = self._join(place, draft)
            with self._grace.shielded(until=place.collector.deadline):
                await workers.hand_over(place.collector, fresh)
            return
        opened = self._enter(draft)
        tasks.start_soon(self._run, opened, name=f"batch {opened.collector.batch.batch_id}")
        with self._grace.shielded(until=opened.collector.deadline):
            await workers.hand_over(opened.collector)

    def _place_for(self, draft: Draft) -> OpenBatch | None:
        if draft.by != "timestamp":
            return None
        return self._gatherings.place_for(draft.key, draft.station_ids)

    def _enter(self, draft: Draft) -> OpenBatch:
        opened = trio.current_time()
        rules = self._settings.rules(draft.topic)
        follow_up = draft.by == "timestamp" and self._gatherings.follows(draft.key)
        batch = self._make_batch(draft, deadline=opened + rules.deadline_s, follow_up=follow_up)
        collector = Collector(
            batch,
            opened=opened,
            quorum=rules.quorum,
            report_bytes=self._settings.report_bytes,
            observer=self._observer,
            waits=draft.by == "timestamp",
        )
        self._observer.observe(BatchOpened(batch=batch, in_flight=self._intake.in_flight + 1))
        entry = OpenBatch(draft=draft, collector=collector)
        self._intake.enter(draft.size_bytes)
        self._open.add(entry)
        if draft.by == "timestamp":
            self._gatherings.enter(draft.key, entry)
        return entry

    def _make_batch(self, draft: Draft, *, deadline: float, follow_up: bool) -> Batch:
        return Batch(
            batch_id=draft.batch_id,
            topic=draft.topic,
            opened_at=self._now(),
            deadline=deadline,
            ranges=draft.ranges,
            entries=draft.entries,
            last_message=draft.last_message,
            bad_entries=draft.bad_entries,
            mislabelled=draft.mislabelled,
            duplicates=draft.duplicates,
            size_bytes=draft.size_bytes,
            roster=() if follow_up else self._settings.rules(draft.topic).roster,
            follow_up=follow_up,
            traceparents=tuple(draft.traceparents),
        )

    def _join(self, place: OpenBatch, draft: Draft) -> tuple[str, ...]:
        """Let a draft join an open batch; return the stations that are new there."""
        fresh = tuple(name for name in draft.station_ids if name not in place.draft.station_ids)
        place.draft.absorb(draft)
        place.grew = True
        place.collector.join(fresh, size_bytes=draft.size_bytes)
        self._intake.grow(draft.size_bytes)
        batch_id = place.collector.batch.batch_id
        self._observer.observe(
            BatchJoined(batch_id=batch_id, ranges=draft.ranges, stations=len(fresh))
        )
        return fresh

    # ------------------------------------------------------------------------------------------------------ batch tasks

    async def _run(self, opened: OpenBatch) -> None:
        """Own one batch from its opening to its end, and what is left of it."""
        remains = await self._see_through(opened)
        del opened  # else it would all live until the task ends
        while remains:
            del remains[-_SLICE:]
            await trio.lowlevel.checkpoint()

    async def _see_through(self, opened: OpenBatch) -> list[object]:
        """Decide and deliver a batch; return what there is to free, if it is much."""
        draft, collector = opened.draft, opened.collector
        delivered = False
        try:
            with self._grace.shielded(until=collector.deadline):
                await collector.done.wait()
            now = trio.current_time()
            if collector.closed or self._grace.is_over:
                # Even if it is complete: its stations are cancelled too, their errors are no answers.
                self._drop(opened)
                return []
            opened.settle_batch()
            report = collector.close(closed_at=self._now())
            lateness_s = max(0.0, now - collector.deadline)
            self._observer.observe(BatchClosed(report=report, lateness_s=lateness_s))
            with self._grace.shielded() as opened.delivery:  # the uploader keeps limits of its own
                await self._uploader.deliver(report)
                delivered = True
            if delivered:
                self._account(draft)
            else:
                self._drop(opened)
            results = report.results
            return [*results, *draft.entries.values()] if len(results) > _SLICE else []
        finally:
            self._open.remove(opened)
            if draft.by == "timestamp":
                self._gatherings.leave(draft.key, opened, delivered=delivered)
            self._intake.leave(draft.size_bytes)

    def _account(self, draft: Draft) -> None:
        for offsets in draft.ranges:
            self._source.account(offsets)

    # -------------------------------------------------------------------------------------------------------- giving up

    def drop_incomplete(self) -> None:
        """The workers die of a bug: a batch that still waits for answers would be uploaded half."""
        for opened in self._open:
            if opened.delivery is None and not opened.collector.done.is_set():
                opened.collector.drop()

    def withdraw(self, gone: Withdrawn) -> None:
        """Partitions were taken away: give up what nobody could commit, its slots are wanted."""
        for topic, partition, generation in gone:
            self._gone[topic, partition] = generation
        for opened in self._open:
            if self._is_withdrawn(opened.draft.ranges):
                if opened.delivery is None:
                    opened.collector.drop()
                else:
                    opened.delivery.cancel()

    def _is_withdrawn(self, ranges: Iterable[OffsetRange]) -> bool:
        gone = self._gone
        return all(r.generation <= gone.get((r.topic, r.partition), -1) for r in ranges)

    def _drop(self, opened: OpenBatch) -> None:
        opened.collector.drop()
        batch = opened.collector.batch
        if self._is_withdrawn(opened.draft.ranges):
            self._observer.observe(BatchWithdrawn(batch=batch))
        else:
            self.dropped += 1
            self._observer.observe(BatchDropped(batch=batch))


def _urgency(opened: OpenBatch) -> tuple[float, str]:
    collector = opened.collector
    return collector.deadline, collector.batch.batch_id  # two of one step keep an order
