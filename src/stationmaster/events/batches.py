"""Messages and batches: from a record that is refused to a batch that is decided."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import attrs

if TYPE_CHECKING:
    from stationmaster.batch import Batch, BatchReport, OffsetRange, Record


@attrs.frozen(kw_only=True)
class MessageRefused:
    """A record is a dead letter: it cannot be used, and its offset moves on."""

    record: Record
    reason: str
    detail: str


@attrs.frozen(kw_only=True)
class EmptyBatch:
    """A batch without stations: nothing to upload, accounted for at once."""

    batch: Batch


@attrs.frozen(kw_only=True)
class BatchOpened:
    """A batch was opened: its deadline runs."""

    batch: Batch
    in_flight: int
    """Open batches, this one included."""


@attrs.frozen(kw_only=True)
class BatchJoined:
    """Messages joined an open batch of the same time (`by = "timestamp"`)."""

    batch_id: str
    """As the batch was opened: its report has the id of all that it covers in the end."""
    ranges: tuple[OffsetRange, ...]
    """Of what joined."""
    stations: int
    """That are new in the batch."""


@attrs.frozen(kw_only=True)
class BatchClosed:
    """A batch is decided; its upload begins."""

    report: BatchReport
    lateness_s: float
    """Seconds between the deadline and this decision; 0 when it was decided before."""


@attrs.frozen(kw_only=True)
class BatchDropped:
    """A batch was still open, or its upload under way, when the shutdown's grace ended: uncommitted, it comes again."""

    batch: Batch


@attrs.frozen(kw_only=True)
class BatchWithdrawn:
    """A batch was given up because all its partitions left this process: it comes again at their new owner."""

    batch: Batch


BatchEvent: TypeAlias = (
    MessageRefused
    | EmptyBatch
    | BatchOpened
    | BatchJoined
    | BatchClosed
    | BatchDropped
    | BatchWithdrawn
)
