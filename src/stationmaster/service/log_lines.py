"""Each event as the line that an operator reads: its level, its words, its fields. Pure.

Texts from outside are cut short here; how a line is written, and escaped, is the business of `logs`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias, assert_never

import attrs

from stationmaster.batch import ClosedBy, Outcome
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

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from stationmaster.batch import BatchReport
    from stationmaster.events import Event

Level: TypeAlias = Literal["debug", "info", "warning", "error"]

_MOST_NAMES: Final = 20
_MOST_CHARS: Final = 300


@attrs.frozen
class Line:
    """One line of the log, not yet written."""

    level: Level
    text: str
    fields: Mapping[str, Any]
    kind: str | None = None
    """Which sort of this line, if it is told once a minute only."""


def line_of(event: Event) -> Line:
    """Return the line for an event."""
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
            detail = _brief(event.detail)
            fields = {"reason": reason, **place, "detail": detail}
            return Line("warning", "dead letter", fields, kind=reason)
        case StationAnswered() | LateResult() | StationTrouble():
            return _station_line(event)
        case StationBreakerOpened() | StationBreakerClosed():
            return _breaker_line(event)
        case ThreadAbandoned() | ThreadReturned() | BatchHandlerTrouble() | ResultHookTrouble():
            return _handler_line(event)
        case UploadDone() | UploadRejected() | UploadRetried() | UploadFailed() | UploadKept():
            return _upload_line(event)
        case UploadAttempted():
            tried = {"status": event.status, "seconds": round(event.seconds, 3)}
            return Line("debug", "upload attempted", {"batch_id": event.batch_id, **tried})
        case UploadsDiverted() | UploadsResumed() | OutboxDelivered() | OutboxRetried():
            return _outbox_line(event)
        case OutboxRejected() | DeadLettersKept() | StoreBlocked() | StoreUnblocked():
            return _store_line(event)
        case StateMovedAside():
            moved = {"path": event.path, "moved_to": event.moved_to, "reason": _brief(event.reason)}
            return Line("error", "state file damaged, moved aside and begun anew", moved)
        case RequestSubmitted() | CallStarted() | CallDone() | CallFailed() | CallAbandoned():
            return _batcher_line(event)
        case CallRerouted() | EndpointPaused() | EndpointOpened() | EndpointClosed():
            return _endpoint_line(event)
        case _:
            return _source_line(event)


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
    fields |= _named("late", late)
    if report.closed_by is ClosedBy.QUORUM:
        return Line("info", "batch quorum", fields)
    return Line("warning", "batch deadline", fields | {"lateness_s": round(lateness_s, 3)})


def _station_line(event: StationAnswered | LateResult | StationTrouble) -> Line:
    fields: dict[str, Any] = {"station_id": event.station_id}
    match event:
        case StationAnswered():
            fields["batch_id"] = event.batch_id
            fields["outcome"] = event.outcome.value
            fields["progress"] = f"{event.answered}/{event.expected}"
            return Line("debug", "station result", fields)
        case LateResult():
            return Line("debug", "late result", {"batch_id": event.batch_id, **fields})
        case StationTrouble(error=error):
            fields["error"] = _error(error)
            return Line("warning", "station trouble", fields, kind=type(error).__name__)
        case _:
            assert_never(event)


def _handler_line(
    event: ThreadAbandoned | ThreadReturned | BatchHandlerTrouble | ResultHookTrouble,
) -> Line:
    fields: dict[str, Any] = {"batch_id": event.batch_id}
    match event:
        case ThreadAbandoned():
            fields.update(
                station_id=event.station_id, abandoned=event.abandoned, threads=event.threads
            )
            if event.abandoned >= event.threads:
                text = "every thread is abandoned: no station is served until one of them ends"
                return Line("error", text, fields, kind="all")
            return Line("warning", "thread goes on after its job was given up", fields, kind="one")
        case ThreadReturned():
            fields.update(station_id=event.station_id, abandoned=event.abandoned)
            fields["seconds"] = round(event.seconds, 3)
            if event.error is None:
                return Line("info", "abandoned thread ended", fields, kind="ended")
            fields["error"] = _error(event.error)
            return Line("info", "abandoned thread ended in an error", fields, kind="error")
        case BatchHandlerTrouble(error=error):
            fields.update(unreported=event.unreported, error=_error(error))
            return Line("warning", "batch handler failed", fields, kind=type(error).__name__)
        case ResultHookTrouble():
            fields.update(station_id=event.station_id, reason=event.reason)
            if event.error is None:
                return Line("warning", "result hook missed a result", fields, kind=event.reason)
            fields["error"] = _error(event.error)
            return Line("warning", "result hook failed", fields, kind=type(event.error).__name__)
        case _:
            assert_never(event)


def _breaker_line(event: StationBreakerOpened | StationBreakerClosed) -> Line:
    """Tell once a minute: stations often fail together."""
    fields: dict[str, Any] = {"station_id": event.station_id}
    match event:
        case StationBreakerOpened():
            fields["timed_out_in_a_row"] = event.failures
            text = "station does not answer: rejected at once until a probe is answered"
            return Line("warning", text, fields, kind="opened")
        case StationBreakerClosed():
            fields["down_s"] = round(event.open_s, 3)
            text = "silent station given up" if event.given_up else "station answers again"
            return Line("info", text, fields, kind="closed")
        case _:
            assert_never(event)


def _upload_line(
    event: UploadDone | UploadRejected | UploadRetried | UploadFailed | UploadKept,
) -> Line:
    fields: dict[str, Any]
    match event:
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
            answer = {"status": event.status, "answer": _brief(event.answer)}
            fields = {"batch_id": report.batch.batch_id, **answer}
            return Line("error", "upload rejected", fields)
        case UploadRetried(batch_id=batch_id, reason=reason):
            fields = {
                "batch_id": batch_id,
                "attempt": event.attempt,
                "reason": _brief(reason),
                "retry_in_s": round(event.retry_in_s, 3),
                "remaining_s": round(event.remaining_s, 3),
            }
            return Line("warning", "upload failed", fields, kind=_brief(reason))
        case UploadFailed(batch_id=batch_id):
            why = {"attempts": event.attempts, "reason": _brief(event.reason)}
            return Line("error", "upload failed", {"batch_id": batch_id, **why})
        case UploadKept(batch_id=batch_id):
            why = {"attempts": event.attempts, "reason": _brief(event.reason)}
            return Line("warning", "sent to outbox", {"batch_id": batch_id, **why})
        case _:
            assert_never(event)


def _outbox_line(
    event: UploadsDiverted | UploadsResumed | OutboxDelivered | OutboxRetried,
) -> Line:
    fields: dict[str, Any]
    match event:
        case UploadsDiverted():
            text = "upload target down: batches go to the outbox until it answers"
            return Line("error", text, {"reason": _brief(event.reason)})
        case UploadsResumed():
            fields = {"down_s": round(event.diverted_s, 3)}
            return Line("info", "upload target answers again", fields)
        case OutboxDelivered():
            fields = {
                "batch_id": event.batch_id,
                "attempts": event.attempts,
                "bytes": event.sent_bytes,
                "waited_s": round(event.waited_s, 3),
                "rows_left": event.rows_left,
            }
            return Line("info", "upload done from outbox", fields)
        case OutboxRetried():
            fields = {
                "batch_id": event.batch_id,
                "attempts": event.attempts,
                "reason": _brief(event.reason),
                "retry_in_s": round(event.retry_in_s, 3),
            }
            return Line("warning", "upload from outbox failed", fields, kind=_brief(event.reason))
        case _:
            assert_never(event)


def _store_line(
    event: OutboxRejected | DeadLettersKept | StoreBlocked | StoreUnblocked,
) -> Line:
    fields: dict[str, Any]
    match event:
        case OutboxRejected():
            answer = {"status": event.status, "answer": _brief(event.answer)}
            return Line(
                "error", "upload from outbox rejected", {"batch_id": event.batch_id, **answer}
            )
        case DeadLettersKept(letters=letters):
            names = [f"{one.topic}/{one.partition}@{one.offset}" for one in letters]
            return Line("debug", "dead letters kept", _named("letters", names))
        case StoreBlocked():
            fields = {"store": event.store, "kind": event.kind, "detail": _brief(event.detail)}
            return Line("error", "store takes nothing: consumption pauses until it does", fields)
        case StoreUnblocked():
            fields = {"store": event.store, "blocked_s": round(event.blocked_s, 3)}
            return Line("info", "store works again", fields)
        case _:
            assert_never(event)


def _batcher_line(
    event: RequestSubmitted | CallStarted | CallDone | CallFailed | CallAbandoned,
) -> Line:
    fields: dict[str, Any] = {"rows": event.rows}
    match event:
        case RequestSubmitted():
            fields["queue_rows"] = event.queue_rows
            return Line("debug", "batcher: request submitted", fields)
        case CallStarted():
            fields["reason"] = event.reason
            fields["oldest_age_s"] = round(event.oldest_age_s, 3)
            fields["queue_rows"] = event.queue_rows
            return Line("debug", "batcher: batch sent", fields)
        case CallDone():
            fields["seconds"] = round(event.seconds, 3)
            return Line("debug", "batcher: call done", fields)
        case CallAbandoned():
            fields["seconds"] = round(event.seconds, 3)
            return Line("debug", "batcher: call abandoned", fields)
        case CallFailed(error=error):
            fields["seconds"] = round(event.seconds, 3)
            fields["error"] = _error(error)
            return Line("error", "batcher: call failed", fields, kind=type(error).__name__)
        case _:
            assert_never(event)


def _endpoint_line(
    event: CallRerouted | EndpointPaused | EndpointOpened | EndpointClosed,
) -> Line:
    fields: dict[str, Any] = {"endpoint": event.endpoint}
    match event:
        case CallRerouted(error=error):
            fields |= {"to": event.to, "rows": event.rows, "error": _error(error)}
            kind = f"{event.endpoint} {type(error).__name__}"
            return Line("warning", "model server failed: its call goes to another", fields, kind)
        case EndpointPaused():
            fields |= {"pause_s": round(event.pause_s, 3), "reason": _brief(event.reason)}
            return Line("warning", "model server asks to wait", fields, kind=event.endpoint)
        case EndpointOpened():
            fields |= {"failures": event.failures, "reason": _brief(event.reason)}
            return Line(
                "error", "model server down: no call goes there until a probe works", fields
            )
        case EndpointClosed():
            fields["down_s"] = round(event.open_s, 3)
            return Line("info", "model server works again", fields)
        case _:
            assert_never(event)


def _source_line(
    event: PartitionsAssigned
    | PartitionsRevoked
    | PartitionsLost
    | OffsetsCommitted
    | SourceTrouble
    | SourceRecovered
    | SourcePaused,
) -> Line:
    match event:
        case PartitionsAssigned(partitions=partitions):
            return Line("info", "partitions assigned", _partitions(partitions))
        case PartitionsRevoked(partitions=partitions, drained=drained):
            fields = {"drained": drained, "drain_s": round(event.drain_s, 3)}
            level: Level = "info" if drained else "warning"
            return Line(level, "partitions revoked", _partitions(partitions) | fields)
        case PartitionsLost(partitions=partitions):
            return Line("warning", "partitions lost", _partitions(partitions))
        case OffsetsCommitted(offsets=offsets):
            names = [f"{one.topic}/{one.partition}@{one.last}" for one in offsets]
            return Line("debug", "offsets committed", _named("offsets", names))
        case SourceTrouble(kind=kind):
            trouble = {"kind": kind, "detail": _brief(event.detail)}
            return Line("warning", "source trouble", trouble, kind=kind)
        case SourceRecovered():
            return Line("info", "source recovered", {})
        case SourcePaused(paused=paused):
            return Line("info", "source paused" if paused else "source resumed", {})
        case _:
            assert_never(event)


def _partitions(partitions: Sequence[tuple[str, int]]) -> dict[str, Any]:
    return _named("partitions", [f"{topic}/{partition}" for topic, partition in partitions])


def _named(field: str, names: Sequence[str]) -> dict[str, Any]:
    """Name the first twenty, and count the others."""
    fields: dict[str, Any] = {field: list(names[:_MOST_NAMES])}
    if len(names) > _MOST_NAMES:
        fields[f"{field}_more"] = len(names) - _MOST_NAMES
    return fields


def _error(error: BaseException) -> str:
    return _brief(f"{type(error).__name__}: {error}")


def _brief(text: str) -> str:
    return text if len(text) <= _MOST_CHARS else f"{text[:_MOST_CHARS]}..."
