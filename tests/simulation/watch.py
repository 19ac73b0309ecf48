"""What must hold for the batches of one life of the process, seen through its events."""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING, Any, Final

import attrs

from stationmaster.batch import ClosedBy, Outcome
from stationmaster.events import (
    BatchClosed,
    BatchDropped,
    BatchJoined,
    BatchOpened,
    BatchWithdrawn,
    MessageRefused,
    StationAnswered,
    UploadFailed,
    UploadRejected,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from stationmaster.batch import Batch, BatchReport, Record
    from stationmaster.events import Event
    from stationmaster.settings import PipelineSettings

GRACE_S: Final = 6.0
_SAME_TICK_S: Final = 1e-9
_ANSWERS: Final = (Outcome.SUCCEEDED, Outcome.NO_OUTPUT, Outcome.FAILED)


class BrokenError(BaseException):
    """An invariant does not hold. No Exception: no handler's edge may take it for a station's failure."""


@attrs.define(eq=False)
class Opened:
    """A batch that was opened in this life."""

    number: int
    batch: Batch
    answered_at: float = -math.inf
    """When a station had its outcome, the last time."""
    ended_at: float = math.inf
    """When it was decided, dropped or withdrawn."""
    grew: bool = False
    """Others joined it: their stations' jobs come later than its number says."""
    shares_id: bool = False
    """Another one was opened under its id while it was open: part of it left and came again, and it had grown. Whose
    station answered cannot be told then."""

    @property
    def has_ended(self) -> bool:
        """Whether it is decided, dropped or withdrawn."""
        return self.ended_at < math.inf


@attrs.define(eq=False)
class Watch:
    """Hears everything, and checks what became of batches."""

    settings: PipelineSettings
    world_check: Callable[..., None]
    same_id: Callable[[Batch], None]
    told: Callable[[Record | BatchReport], None]
    """Takes note of what is refused for good, and kept by nobody if there is no store."""
    note: Callable[..., None]
    now: Callable[[], float]
    """Virtual time, in any thread."""
    end: float = math.inf
    """The end of the grace."""
    over: bool = False
    """The process is gone: what its remains do is nobody's business."""
    broke: bool = False
    """The source broke, on purpose."""
    batches: int = 0
    closed: int = 0
    outcomes: Counter[Outcome] = attrs.field(factory=Counter)
    """Of stations, in the batches that were decided."""
    may_fail: set[tuple[int, str]] = attrs.field(factory=set)
    """Number of a batch, and a station, of which a handler made a failure on purpose."""
    helpers_fell: set[str] = attrs.field(factory=set)
    """Stations whose jobs a helper task took along, whichever job that was."""
    drained_at: float = math.inf
    """When polling was told to stop."""
    gone: set[tuple[str, int, int]] = attrs.field(factory=set)
    """Topic, partition and generation of what was taken away."""
    opened: dict[str, Opened] = attrs.field(factory=dict)
    """By the id under which it was opened."""
    _by_entries: dict[int, Opened] = attrs.field(factory=dict)
    """By the identity of its table, which a batch keeps when others join and its id changes."""
    detailed: bool = True

    def check(self, condition: object, *facts: object) -> None:
        """Raise if an invariant does not hold."""
        if not self.over:
            self.world_check(condition, *facts)

    def draw_in(self, seconds: float) -> None:
        """Take note that the end comes so soon."""
        self.end = min(self.end, self.now() + seconds)

    def has_left(self, batch: Batch) -> bool:
        """Tell whether all its partitions were taken away."""
        return self.gone.issuperset((r.topic, r.partition, r.generation) for r in batch.ranges)

    def of(self, batch: Batch) -> Opened:
        """Return what is known of a batch, or of a handler's copy of it."""
        found = self._by_entries.get(id(batch.entries)) or self.opened.get(batch.batch_id)
        self.check(found is not None or self.over, "nobody opened it", batch.batch_id)
        return found if found is not None else Opened(-1, batch)

    # ----------------------------------------------------------------------------------------------------------- events

    def observe(self, event: Event, /) -> None:
        """Look at one event."""
        if self.over:
            return
        now = self.now()
        match event:
            case BatchOpened(batch=batch, in_flight=in_flight):
                opened = Opened(self.batches, batch)
                earlier = self.opened.get(batch.batch_id)
                if earlier is not None and not earlier.has_ended:
                    self.check(earlier.grew, "two open batches are the same", batch.batch_id)
                    earlier.shares_id = opened.shares_id = True
                self.batches += 1
                self._by_entries[id(batch.entries)] = self.opened[batch.batch_id] = opened
                self.check(not self.has_left(batch), "opened after its partitions left")
                self.check(in_flight <= self.settings.max_in_flight, "more batches than slots")
                deadline_s = self.settings.rules(batch.topic).deadline_s
                self.check(abs(batch.deadline - now - deadline_s) < _SAME_TICK_S, "its deadline")
            case StationAnswered(batch_id=batch_id):
                self.opened[batch_id].answered_at = now
            case BatchClosed(report=report, lateness_s=lateness_s):
                self._closed(report, now, lateness_s)
            case BatchDropped(batch=batch):
                self.check(now >= self.end, "dropped before the end of the grace")
                self._ended(batch)
            case BatchWithdrawn(batch=batch):
                self.check(self.has_left(batch), "withdrawn, and its partitions are here")
                self._ended(batch)
            case BatchJoined(batch_id=batch_id):
                self.opened[batch_id].grew = True
            case MessageRefused(record=record):
                self.told(record)
            case UploadRejected(report=report):
                self.told(report)
            case UploadFailed() if not self.broke:
                self.draw_in(
                    GRACE_S
                )  # the pipeline ends: what is open has the grace, as in a drain
            case _:
                pass
        self.note(type(event).__name__, getattr(event, "batch_id", ""))

    def _ended(self, batch: Batch) -> Opened:
        opened = self.of(batch)
        opened.ended_at = self.now()
        return opened

    def _closed(self, report: BatchReport, now: float, lateness_s: float) -> None:
        batch = report.batch
        self.check(not self.of(batch).has_ended, "two decisions about one batch", batch.batch_id)
        opened = self._ended(batch)
        self.closed += 1
        self.same_id(batch)
        by_deadline = report.closed_by is ClosedBy.DEADLINE
        due = batch.deadline if by_deadline else opened.answered_at
        at_once = opened.shares_id or abs(now - due) < _SAME_TICK_S
        on_time = at_once and now - batch.deadline < _SAME_TICK_S
        self.check(on_time and lateness_s < _SAME_TICK_S, "late", report.closed_by, now - due)
        self._whole(report)
        self._truthful(report, opened)

    def _whole(self, report: BatchReport) -> None:
        """Everybody is in the report, once, and in order."""
        batch = report.batch
        names = [result.station_id for result in report.results]
        absent = [name for name in batch.roster if name not in batch.entries]
        self.check(names == [*batch.entries, *absent], "a station is lost, or out of its order")
        counted = dict.fromkeys(Outcome, 0)
        for result in report.results:
            counted[result.outcome] += 1
            is_missing = result.outcome is Outcome.MISSING
            self.check(is_missing == (result.station_id not in batch.entries), "missing, or not")
        self.check(counted == dict(report.counts), "the counts differ from the results")

    def _truthful(self, report: BatchReport, opened: Opened) -> None:
        """Results are its own, and the rule that closed it holds."""
        self.outcomes.update(result.outcome for result in report.results)
        for result in report.results:
            name = result.station_id
            if result.outcome is Outcome.FAILED:
                caused = (opened.number, name) in self.may_fail
                caused = caused or name in self.helpers_fell
                self.check(caused, "failed without a cause", name, result.reason)
            if result.outcome is Outcome.REJECTED:
                self._rejected(result.reason)
            if result.outcome is Outcome.SUCCEEDED:
                own = {"of": opened.number, "by": result.station_id}
                self.check(result.value == own, "a result of another job", result.value, own)
        counts = report.counts
        if report.closed_by is ClosedBy.COMPLETE and self.settings.job_timeout_s is None:
            self.check(counts[Outcome.TIMED_OUT] == 0, "complete, and somebody timed out")
        quorum = self.settings.rules(report.batch.topic).quorum
        if report.closed_by is ClosedBy.QUORUM:
            answers = sum(counts[outcome] for outcome in _ANSWERS)
            waited_for = len(report.results) - counts[Outcome.REJECTED]
            if not report.batch.roster:
                self.check(answers >= quorum * waited_for - 1e-9, "no quorum", dict(counts))
        if report.closed_by is ClosedBy.DEADLINE and not report.batch.roster:
            self.check(counts[Outcome.TIMED_OUT] > 0, "the deadline closed what was complete")

    def _rejected(self, reason: str) -> None:
        """Whoever rejects had the means to."""
        settings = self.settings
        means = {
            "stations.max_live": settings.max_live < 1_000,
            "stations.breaker_failures": settings.breaker_failures > 0,
            "does not come back": True,
            "cannot end in time": True,
            "DeadlineUnreachableError": True,
        }
        had = [have for words, have in means.items() if words in reason]
        self.check(any(had), "rejected without a cause", reason)

    def at_end(self) -> None:
        """Nothing is left."""
        left = [opened.batch.batch_id for opened in self.opened.values() if not opened.has_ended]
        self.check(not left, "batches without a decision", left)


def value_of(opened: Opened, station_id: str) -> dict[str, Any]:
    """Return what a job of this batch answers."""
    return {"of": opened.number, "by": station_id}
