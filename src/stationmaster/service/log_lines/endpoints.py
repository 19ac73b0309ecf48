"""Model servers as lines of the log."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, assert_never

from stationmaster.events import CallRerouted, EndpointClosed, EndpointOpened, EndpointPaused
from stationmaster.service.log_lines.line import Line, brief, words_of

if TYPE_CHECKING:
    from stationmaster.events import EndpointEvent


def endpoint_line(event: EndpointEvent) -> Line:
    """Return the line for an event of this part."""
    fields: dict[str, Any] = {"endpoint": event.endpoint}
    match event:
        case CallRerouted(error=error):
            fields |= {"to": event.to, "rows": event.rows, "error": words_of(error)}
            kind = f"{event.endpoint} {type(error).__name__}"
            return Line("warning", "model server failed: its call goes to another", fields, kind)
        case EndpointPaused():
            fields |= {"pause_s": round(event.pause_s, 3), "reason": brief(event.reason)}
            return Line("warning", "model server asks to wait", fields, kind=event.endpoint)
        case EndpointOpened():
            fields |= {"failures": event.failures, "reason": brief(event.reason)}
            return Line(
                "error", "model server down: no call goes there until a probe works", fields
            )
        case EndpointClosed():
            fields["down_s"] = round(event.open_s, 3)
            return Line("info", "model server works again", fields)
        case _:
            assert_never(event)
