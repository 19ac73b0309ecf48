"""The collector of one open batch: it takes one outcome per station and decides when the batch is done.

Rules:
1. The first outcome of a station counts; later ones are ignored.
2. Expected are the stations with data in the batch and those of its roster. One of the roster without data is missing
   and never waited for; a batch that others may join (`waits`) waits for it, and it is missing if the batch closes
   without.
3. Done when every station that is waited for has an outcome (complete), or when
   `answers >= ceil(quorum x (waited for - rejected))` for a quorum below 1; an answer is a success, a None or a
   failure, not a rejection.
4. `close()` is synchronous: it marks the rest timed out, cancels what still runs and makes the report, so nothing can
   slip in between the decision and the snapshot. There is exactly one report.
5. At a tie of last result and deadline the state decides: a batch whose outcomes are all here is complete.
6. What comes after closing is late: counted and dropped. What is done takes nobody in any more.

Everything happens on one loop without a checkpoint in between, so there is no lock.
"""

from __future__ import annotations

import math
from collections import Counter
from operator import attrgetter
from typing import TYPE_CHECKING

import trio

from stationmaster.batch import Batch, BatchReport, ClosedBy, Outcome, StationResult
from stationmaster.events import LateResult, StationAnswered

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterable
    from datetime import datetime

    from stationmaster.abc import Observer

_ANSWERS = frozenset({Outcome.SUCCEEDED, Outcome.NO_OUTPUT, Outcome.FAILED})
# A report is made in one step: no line of Python for each of its results.
_OUTCOME = attrgetter("outcome")


class Collector:
    """Collects the outcomes of one batch."""

    __slots__ = (
        "_absent",
        "_answers",
        "_bytes_left",
        "_calls",
        "_detailed",
        "_expected",
        "_observer",
        "_outcomes",
        "_quorum",
        "_rejected",
        "_running",
        "_waits",
        "batch",
        "closed",
        "deadline",
        "done",
        "opened",
        "size_bytes",
    )

    def __init__(
        self,
        batch: Batch,
        *,
        opened: float,
        quorum: float,
        report_bytes: int,
        observer: Observer,
        waits: bool = False,
    ) -> None:
        """Begin to collect.

        Args:
            batch: the opened batch; its stations and its roster are the expected ones.
            opened: when it was opened, on trio's clock.
            quorum: 0 < quorum <= 1.
            report_bytes: bound of all encoded results together; what exceeds it fails its own station.
            observer: hears of late results, and of every outcome if it is detailed.
            waits: whether others may join, and the roster is waited for.
        """
        self.batch: Batch = batch
        self.size_bytes: int = batch.size_bytes
        self.deadline: float = batch.deadline
        self.opened: float = opened
        self.closed: bool = False
        self.done: trio.Event = trio.Event()
        self._quorum = quorum
        self._bytes_left = report_bytes
        self._observer = observer
        self._detailed = observer.detailed
        self._waits = waits
        self._absent = dict.fromkeys(name for name in batch.roster if name not in batch.entries)
        self._expected = self._count_expected()
        self._answers = 0
        self._rejected = 0
        self._outcomes: dict[str, StationResult] = {}
        self._running: dict[str, Callable[[], None]] = {}
        self._calls: dict[Callable[[], None], frozenset[str]] = {}
        if not self._expected:
            self.done.set()

    def takes(self, station_ids: Iterable[str]) -> bool:
        """Tell whether data of these stations may join: nothing is decided, and none of their jobs has begun."""
        if not self._waits or self.closed or self.done.is_set():
            return False
        begun: tuple[Container[str], ...] = (self._outcomes, self._running, *self._calls.values())
        return not any(name in some for name in station_ids for some in begun)

    def join(self, station_ids: Iterable[str], *, size_bytes: int = 0) -> None:
        """Expect these stations too; their data, of so many bytes, is in the batch already."""
        self.size_bytes += size_bytes
        for station_id in station_ids:
            self._absent.pop(station_id, None)
        self._expected = self._count_expected()

    def _count_expected(self) -> int:
        return len(self.batch.entries) + (len(self._absent) if self._waits else 0)

    @property
    def answered(self) -> int:
        """Stations that have an outcome; 0 once the batch is closed."""
        return len(self._outcomes)

    @property
    def expected(self) -> int:
        """Stations that are waited for."""
        return self._expected

    def begin(self, station_id: str, cancel: Callable[[], None]) -> None:
        """Take note that a station's handler runs; `cancel` is called if it still does when the batch closes."""
        self._running[station_id] = cancel

    def end(self, station_id: str) -> None:
        """Take note that it runs no more, with or without an outcome."""
        self._running.pop(station_id, None)

    def begin_call(self, station_ids: frozenset[str], cancel: Callable[[], None]) -> None:
        """Take note that one call for all these stations runs; it is known by its `cancel`, which must be its own."""
        self._calls[cancel] = station_ids

    def end_call(self, cancel: Callable[[], None]) -> None:
        """Take note that it runs no more, whatever it reported."""
        self._calls.pop(cancel, None)

    def settle(self, result: StationResult) -> None:
        """Take a station's outcome."""
        station_id, outcomes = result.station_id, self._outcomes
        if self.closed:
            if result.outcome in _ANSWERS:
                self._observer.observe(
                    LateResult(batch_id=self.batch.batch_id, station_id=station_id)
                )
            return
        if station_id in outcomes:
            return
        size = len(result.encoded)
        if size > self._bytes_left:
            result = StationResult(
                station_id, Outcome.FAILED, None, "the report is full (limits.report_bytes)"
            )
        else:
            self._bytes_left -= size
        outcomes[station_id] = result
        outcome = result.outcome
        if outcome in _ANSWERS:
            self._answers += 1
        elif outcome is Outcome.REJECTED:  # not a job that timed out before its batch
            self._rejected += 1
        if self._detailed:
            self._observer.observe(
                StationAnswered(
                    batch_id=self.batch.batch_id,
                    station_id=station_id,
                    outcome=outcome,
                    answered=len(outcomes),
                    expected=self._expected,
                )
            )
        if len(outcomes) == self._expected or (self._quorum < 1 and self._quorum_reached()):
            self.done.set()

    def close(self, *, closed_at: datetime) -> BatchReport:
        """Close the batch and return its one report."""
        running = self._shut()
        outcomes = self._outcomes
        if len(outcomes) == self._expected:
            closed_by = ClosedBy.COMPLETE
        elif self._quorum_reached():
            closed_by = ClosedBy.QUORUM
        else:
            closed_by = ClosedBy.DEADLINE
        why = "deadline" if closed_by is ClosedBy.DEADLINE else "quorum"
        entries = self.batch.entries
        if len(outcomes) < len(entries):
            for station_id in entries:
                if station_id not in outcomes:
                    did = "no answer" if station_id in running else "not started"
                    reason = f"{did} when the {why} closed the batch"
                    outcomes[station_id] = StationResult(
                        station_id, Outcome.TIMED_OUT, None, reason
                    )
        reason = (
            f"no data when the {why} closed the batch" if self._waits else "no data in the batch"
        )
        results = (
            *map(outcomes.__getitem__, entries),
            *(StationResult(name, Outcome.MISSING, None, reason) for name in self._absent),
        )
        counts = dict.fromkeys(Outcome, 0) | Counter(map(_OUTCOME, results))
        self._outcomes = {}  # a stuck station may hold this collector for long
        return BatchReport(
            batch=self.batch,
            closed_by=closed_by,
            closed_at=closed_at,
            duration_s=trio.current_time() - self.opened,
            results=results,
            counts=counts,
        )

    def drop(self) -> None:
        """Close the batch without a report: it comes again. Whoever waits for `done` finds it closed."""
        self._shut()
        self._outcomes = {}
        self.done.set()

    def _shut(self) -> set[str]:
        """Cancel what runs; return the stations it is about."""
        self.closed = True
        running = set(self._running).union(*self._calls.values())
        cancels = (*self._running.values(), *self._calls)
        self._running.clear()
        self._calls.clear()
        for cancel in cancels:
            cancel()
        return running

    def _quorum_reached(self) -> bool:
        if self._quorum >= 1:
            return False
        share = self._quorum * (self._expected - self._rejected)
        # 0.55 x 100 is a little above 55 in floating point. A batch of nothing but rejections is complete, no quorum.
        return self._answers >= max(1, math.ceil(share - 1e-9))
