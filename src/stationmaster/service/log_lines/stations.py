"""Stations, and those who answer for them, as lines of the log."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, assert_never

from stationmaster.events import (
    BatchHandlerTrouble,
    LateResult,
    ResultHookTrouble,
    StationAnswered,
    StationBreakerClosed,
    StationBreakerOpened,
    StationTrouble,
    ThreadAbandoned,
    ThreadReturned,
)
from stationmaster.service.log_lines.line import Line, words_of

if TYPE_CHECKING:
    from stationmaster.events import StationEvent


def station_line(event: StationEvent) -> Line:
    """Return the line for an event of this part. Breakers are told once a minute: stations often fail together."""
    if isinstance(
        event, ThreadAbandoned | ThreadReturned | BatchHandlerTrouble | ResultHookTrouble
    ):
        return _handler_line(event)
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
            fields["error"] = words_of(error)
            return Line("warning", "station trouble", fields, kind=type(error).__name__)
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
            fields["error"] = words_of(event.error)
            return Line("info", "abandoned thread ended in an error", fields, kind="error")
        case BatchHandlerTrouble(error=error):
            fields.update(unreported=event.unreported, error=words_of(error))
            return Line("warning", "batch handler failed", fields, kind=type(error).__name__)
        case ResultHookTrouble():
            fields.update(station_id=event.station_id, reason=event.reason)
            if event.error is None:
                return Line("warning", "result hook missed a result", fields, kind=event.reason)
            fields["error"] = words_of(event.error)
            return Line("warning", "result hook failed", fields, kind=type(event.error).__name__)
        case _:
            assert_never(event)
