"""The source as lines of the log."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, assert_never

from stationmaster.events import (
    OffsetsCommitted,
    PartitionsAssigned,
    PartitionsLost,
    PartitionsRevoked,
    SourcePaused,
    SourceRecovered,
    SourceTrouble,
)
from stationmaster.service.log_lines.line import Level, Line, brief, named

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stationmaster.events import SourceEvent


def source_line(event: SourceEvent) -> Line:
    """Return the line for an event of this part."""
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
            return Line("debug", "offsets committed", named("offsets", names))
        case SourceTrouble(kind=kind):
            trouble = {"kind": kind, "detail": brief(event.detail)}
            return Line("warning", "source trouble", trouble, kind=kind)
        case SourceRecovered():
            return Line("info", "source recovered", {})
        case SourcePaused(paused=paused):
            return Line("info", "source paused" if paused else "source resumed", {})
        case _:
            assert_never(event)


def _partitions(partitions: Sequence[tuple[str, int]]) -> dict[str, Any]:
    return named("partitions", [f"{topic}/{partition}" for topic, partition in partitions])
