"""Messages and batches as lines of the log."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, assert_never

from stationmaster.batch import ClosedBy, Outcome
from stationmaster.events import (
    BatchClosed,
    BatchDropped,
    BatchJoined,
    BatchOpened,
    BatchWithdrawn,
    EmptyBatch,
    MessageRefused,
)
from stationmaster.service.log_lines.line import Line, brief, named

if TYPE_CHECKING:
    from stationmaster.batch import BatchReport
    from stationmaster.events import BatchEvent


def batch_line(event: BatchEvent) -> Line:
    """Return the line for an event of this part."""
    fields: dict[str, Any]
    match event:
        case BatchOpened(batch=batch):
            expected = len({*batch.entries, *batch.roster})
            fields = {"topic": batch.topic, "expected": expected, "in_flight": event.in_flight}
            if batch.bad_entries:
                fields["bad_entries"] = len(batch.bad_entries)
            if batch.mislabelled:
                fields["mislabelled"] = batch.mislabelled
            if batch.follow_up:
                fields["follow_up"] = True
            return Line("info", "batch created", {"batch_id": batch.batch_id, **fields})
        case BatchJoined():
            fields = {"batch_id": event.batch_id, "stations": event.stations}
            return Line("debug", "batch joined", fields)
        case EmptyBatch(batch=batch):
            return Line("info", "batch empty", {"batch_id": batch.batch_id, "topic": batch.topic})
        case BatchClosed(report=report):
            return _closed(report, event.lateness_s)
        case BatchDropped(batch=batch):
            return Line("warning", "batch dropped", {"batch_id": batch.batch_id})
        case BatchWithdrawn(batch=batch):
            return Line("warning", "batch withdrawn", {"batch_id": batch.batch_id})
        case MessageRefused(record=record, reason=reason):
            place = {
                "topic": record.topic,
                "partition": record.partition,
                "offset": record.offset,
            }
            detail = brief(event.detail)
            fields = {"reason": reason, **place, "detail": detail}
            return Line("warning", "dead letter", fields, kind=reason)
        case _:
            assert_never(event)


def _closed(report: BatchReport, lateness_s: float) -> Line:
    late = [result.station_id for result in report.results if result.outcome is Outcome.TIMED_OUT]
    expected = sum(report.counts.values())
    done = expected - report.counts[Outcome.TIMED_OUT] - report.counts[Outcome.MISSING]
    fields = {
        "batch_id": report.batch.batch_id,
        "done": f"{done}/{expected}",
        "seconds": round(report.duration_s, 3),
    }
    if report.closed_by is ClosedBy.COMPLETE:
        return Line("info", "batch complete", fields)
    fields |= named("late", late)
    if report.closed_by is ClosedBy.QUORUM:
        return Line("info", "batch quorum", fields)
    return Line("warning", "batch deadline", fields | {"lateness_s": round(lateness_s, 3)})
