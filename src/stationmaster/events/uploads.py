"""Uploads: whether the target takes closed batches."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import attrs

if TYPE_CHECKING:
    from stationmaster.batch import BatchReport


@attrs.frozen(kw_only=True)
class UploadAttempted:
    """One request to the target ended, well or not; what it means for its batch is another event."""

    batch_id: str
    status: int | None
    """Of the answer; None: there was none, or the sink has no such thing."""
    seconds: float
    from_outbox: bool


@attrs.frozen(kw_only=True)
class UploadRetried:
    """An attempt to upload failed and will be repeated."""

    batch_id: str
    attempt: int
    reason: str
    retry_in_s: float
    remaining_s: float
    """Seconds left for all further attempts."""


@attrs.frozen(kw_only=True)
class UploadDone:
    """The target accepted a batch."""

    report: BatchReport
    attempts: int
    seconds: float
    sent_bytes: int = 0


@attrs.frozen(kw_only=True)
class UploadRejected:
    """The target refuses this batch for good; the service goes on."""

    report: BatchReport
    status: int
    answer: str


@attrs.frozen(kw_only=True)
class UploadFailed:
    """A batch could not be delivered within its limit."""

    batch_id: str
    attempts: int
    reason: str


@attrs.frozen(kw_only=True)
class UploadKept:
    """A batch lies in the outbox: durable, its offsets count. It is delivered from there."""

    batch_id: str
    attempts: int
    """Attempts to upload it before."""
    reason: str
    """Why it was not uploaded at once."""


@attrs.frozen(kw_only=True)
class UploadsDiverted:
    """The target is known to be down: closed batches go to the outbox at once, until a probe is accepted."""

    reason: str
    refused: bool = False
    """It refuses everybody: a token or a URL must be mended, waiting does not help."""


@attrs.frozen(kw_only=True)
class UploadsResumed:
    """The target takes batches again."""

    diverted_s: float


UploadEvent: TypeAlias = (
    UploadAttempted
    | UploadRetried
    | UploadDone
    | UploadRejected
    | UploadFailed
    | UploadKept
    | UploadsDiverted
    | UploadsResumed
)
