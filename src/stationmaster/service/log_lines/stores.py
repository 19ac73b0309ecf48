"""Outbox and dead letters as lines of the log."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, assert_never

from stationmaster.events import (
    DeadLettersKept,
    OutboxDelivered,
    OutboxRejected,
    OutboxRetried,
    StateMovedAside,
    StoreBlocked,
    StoreUnblocked,
)
from stationmaster.service.log_lines.line import Line, brief, named

if TYPE_CHECKING:
    from stationmaster.events import StoreEvent


def store_line(event: StoreEvent) -> Line:
    """Return the line for an event of this part."""
    fields: dict[str, Any]
    match event:
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
                "reason": brief(event.reason),
                "retry_in_s": round(event.retry_in_s, 3),
            }
            return Line("warning", "upload from outbox failed", fields, kind=brief(event.reason))
        case OutboxRejected():
            answer = {"status": event.status, "answer": brief(event.answer)}
            return Line(
                "error", "upload from outbox rejected", {"batch_id": event.batch_id, **answer}
            )
        case DeadLettersKept(letters=letters):
            names = [f"{one.topic}/{one.partition}@{one.offset}" for one in letters]
            return Line("debug", "dead letters kept", named("letters", names))
        case StoreBlocked():
            fields = {"store": event.store, "kind": event.kind, "detail": brief(event.detail)}
            return Line("error", "store takes nothing: consumption pauses until it does", fields)
        case StoreUnblocked():
            fields = {"store": event.store, "blocked_s": round(event.blocked_s, 3)}
            return Line("info", "store works again", fields)
        case StateMovedAside():
            moved = {"path": event.path, "moved_to": event.moved_to, "reason": brief(event.reason)}
            return Line("error", "state file damaged, moved aside and begun anew", moved)
        case _:
            assert_never(event)
