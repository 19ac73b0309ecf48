"""Each event as the line that an operator reads: its level, its words, its fields. Pure. One file for each part.

Texts from outside are cut short here; how a line is written, and escaped, is the business of `logs`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, assert_never

from stationmaster.events import (
    BatcherEvent,
    BatchEvent,
    EndpointEvent,
    SourceEvent,
    StationEvent,
    StoreEvent,
    UploadEvent,
)
from stationmaster.service.log_lines.batcher import batcher_line
from stationmaster.service.log_lines.batches import batch_line
from stationmaster.service.log_lines.endpoints import endpoint_line
from stationmaster.service.log_lines.line import Level, Line
from stationmaster.service.log_lines.sources import source_line
from stationmaster.service.log_lines.stations import station_line
from stationmaster.service.log_lines.stores import store_line
from stationmaster.service.log_lines.uploads import upload_line

if TYPE_CHECKING:
    from stationmaster.events import Event

__all__ = ["Level", "Line", "line_of"]


def line_of(event: Event) -> Line:
    """Return the line for an event."""
    if isinstance(event, BatchEvent):
        return batch_line(event)
    if isinstance(event, StationEvent):
        return station_line(event)
    if isinstance(event, UploadEvent):
        return upload_line(event)
    if isinstance(event, StoreEvent):
        return store_line(event)
    if isinstance(event, SourceEvent):
        return source_line(event)
    if isinstance(event, BatcherEvent):
        return batcher_line(event)
    if isinstance(event, EndpointEvent):
        return endpoint_line(event)
    assert_never(event)
