"""The request batcher as lines of the log."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, assert_never

from stationmaster.events import CallAbandoned, CallDone, CallFailed, CallStarted, RequestSubmitted
from stationmaster.service.log_lines.line import Line, words_of

if TYPE_CHECKING:
    from stationmaster.events import BatcherEvent


def batcher_line(event: BatcherEvent) -> Line:
    """Return the line for an event of this part."""
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
            fields["error"] = words_of(error)
            return Line("error", "batcher: call failed", fields, kind=type(error).__name__)
        case _:
            assert_never(event)
