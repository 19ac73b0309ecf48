"""Uploads as lines of the log."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, assert_never

from stationmaster.batch import Outcome
from stationmaster.events import (
    UploadAttempted,
    UploadDone,
    UploadFailed,
    UploadKept,
    UploadRejected,
    UploadRetried,
    UploadsDiverted,
    UploadsResumed,
)
from stationmaster.service.log_lines.line import Line, brief

if TYPE_CHECKING:
    from stationmaster.events import UploadEvent


def upload_line(event: UploadEvent) -> Line:
    """Return the line for an event of this part."""
    fields: dict[str, Any]
    match event:
        case UploadAttempted(batch_id=batch_id):
            tried = {"status": event.status, "seconds": round(event.seconds, 3)}
            return Line("debug", "upload attempted", {"batch_id": batch_id, **tried})
        case UploadDone(report=report):
            counts = {outcome.name.lower(): report.counts[outcome] for outcome in Outcome}
            cost = {
                "attempts": event.attempts,
                "bytes": event.sent_bytes,
                "seconds": round(event.seconds, 3),
            }
            fields = {"batch_id": report.batch.batch_id, **counts, **cost}
            return Line("info", "upload done", fields)
        case UploadRejected(report=report):
            answer = {"status": event.status, "answer": brief(event.answer)}
            fields = {"batch_id": report.batch.batch_id, **answer}
            return Line("error", "upload rejected", fields)
        case UploadRetried(batch_id=batch_id, reason=reason):
            fields = {
                "batch_id": batch_id,
                "attempt": event.attempt,
                "reason": brief(reason),
                "retry_in_s": round(event.retry_in_s, 3),
                "remaining_s": round(event.remaining_s, 3),
            }
            return Line("warning", "upload failed", fields, kind=brief(reason))
        case UploadFailed(batch_id=batch_id):
            why = {"attempts": event.attempts, "reason": brief(event.reason)}
            return Line("error", "upload failed", {"batch_id": batch_id, **why})
        case UploadKept(batch_id=batch_id):
            why = {"attempts": event.attempts, "reason": brief(event.reason)}
            return Line("warning", "sent to outbox", {"batch_id": batch_id, **why})
        case UploadsDiverted():
            text = "upload target down: batches go to the outbox until it answers"
            return Line("error", text, {"reason": brief(event.reason)})
        case UploadsResumed():
            fields = {"down_s": round(event.diverted_s, 3)}
            return Line("info", "upload target answers again", fields)
        case _:
            assert_never(event)
