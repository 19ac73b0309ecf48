"""What happened, as frozen values: the one seam for logs, metrics, the status page and tests."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import attrs

if TYPE_CHECKING:
    from stationmaster.batch import Batch, BatchReport, DeadLetter, OffsetRange, Outcome, Record

# --------------------------------------------------------------------------------------------- messages and batches


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
class StationAnswered:
    """A station has its outcome (only for detailed observers)."""

    batch_id: str
    station_id: str
    outcome: Outcome
    answered: int
    expected: int


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


@attrs.frozen(kw_only=True)
class LateResult:
    """A handler answered after its batch was closed: counted and dropped."""

    batch_id: str
    station_id: str


@attrs.frozen(kw_only=True)
class StationTrouble:
    """A helper task that a handler left in its station's nursery failed; the station goes on anew."""

    station_id: str
    error: BaseException


@attrs.frozen(kw_only=True)
class ThreadAbandoned:
    """A plain function did not return before its job was given up: its thread goes on, its station stays busy."""

    batch_id: str
    station_id: str
    abandoned: int
    """Such threads now, this one included. Each holds its place until it really ends."""
    threads: int
    """Places there are: when all are abandoned, no plain function runs any more."""


@attrs.frozen(kw_only=True)
class ThreadReturned:
    """An abandoned thread has ended: its station is free again. A result is late: counted and dropped."""

    batch_id: str
    station_id: str
    abandoned: int
    """Those that are left."""
    seconds: float
    """Since it was abandoned."""
    error: BaseException | None
    """What it raised."""


@attrs.frozen(kw_only=True)
class BatchHandlerTrouble:
    """A call of a batch handler raised, or reported wrongly; the stations that it had not reported failed."""

    batch_id: str
    error: Exception
    unreported: int


@attrs.frozen(kw_only=True)
class ResultHookTrouble:
    """The result hook did not take a result: it raised, took too long, or too many wait. The batch is not concerned."""

    batch_id: str
    station_id: str
    reason: str
    """A short bounded name: error, timeout, full or closing."""
    error: Exception | None = None


@attrs.frozen(kw_only=True)
class StationBreakerOpened:
    """So many jobs of a station timed out in a row: its jobs are rejected at once, but for a probe now and then."""

    station_id: str
    failures: int


@attrs.frozen(kw_only=True)
class StationBreakerClosed:
    """A station whose breaker was open answers again, or was given up as idle (and is unknown from now on)."""

    station_id: str
    open_s: float
    given_up: bool = False


# ----------------------------------------------------------------------------------------------------------- upload


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


# ------------------------------------------------------------------------------------------ outbox and dead letters


@attrs.frozen(kw_only=True)
class OutboxDelivered:
    """The target accepted a batch out of the outbox."""

    batch_id: str
    attempts: int
    """Out of the outbox, over all runs of the service."""
    waited_s: float
    """By the wall clock, since it was kept."""
    sent_bytes: int
    rows_left: int


@attrs.frozen(kw_only=True)
class OutboxRetried:
    """An attempt to deliver a batch out of the outbox failed; it stays there."""

    batch_id: str
    attempts: int
    reason: str
    retry_in_s: float


@attrs.frozen(kw_only=True)
class OutboxRejected:
    """The target refuses a batch out of the outbox for good: it is a dead letter now."""

    batch_id: str
    status: int
    answer: str


@attrs.frozen(kw_only=True)
class DeadLettersKept:
    """Dead letters are durable: their offsets count."""

    letters: tuple[DeadLetter, ...]


@attrs.frozen(kw_only=True)
class StoreBlocked:
    """Something that must be kept cannot be: consumption pauses until it can. Said once until `StoreUnblocked`."""

    store: str
    """`outbox`, `dead-letters`, or `outbox-replay`: what became of a delivery out of the outbox cannot be written."""
    kind: str
    """See `stationmaster.errors.StoreError`."""
    detail: str


@attrs.frozen(kw_only=True)
class StoreUnblocked:
    """What was blocked is kept (or found another home)."""

    store: str
    blocked_s: float


@attrs.frozen(kw_only=True)
class StateMovedAside:
    """The state file is damaged: it was moved aside whole, and a new one begun. What it held is only in there."""

    path: str
    moved_to: str
    reason: str


# ----------------------------------------------------------------------------------------------------------- source


@attrs.frozen(kw_only=True)
class PartitionsAssigned:
    """Partitions came to this process."""

    partitions: tuple[tuple[str, int], ...]


@attrs.frozen(kw_only=True)
class PartitionsRevoked:
    """Partitions left this process after their batches had time to finish."""

    partitions: tuple[tuple[str, int], ...]
    drain_s: float
    """Seconds that were waited."""
    drained: bool
    """Everything polled from them was accounted for and committed."""


@attrs.frozen(kw_only=True)
class PartitionsLost:
    """Partitions were taken away without a chance to commit: what was open comes again elsewhere."""

    partitions: tuple[tuple[str, int], ...]


@attrs.frozen(kw_only=True)
class OffsetsCommitted:
    """The broker took a commit: `last` of each range is the last accounted offset."""

    offsets: tuple[OffsetRange, ...]


@attrs.frozen(kw_only=True)
class SourceTrouble:
    """The source has a difficulty and goes on trying: `kind` is a short bounded name, `detail` is for people."""

    kind: str
    detail: str


@attrs.frozen(kw_only=True)
class SourceRecovered:
    """The source works again after trouble."""


@attrs.frozen(kw_only=True)
class SourcePaused:
    """Consumption was paused (`paused`) or resumed: the pipeline had no room."""

    paused: bool


# ---------------------------------------------------------------------------------------------------------- batcher


@attrs.frozen(kw_only=True)
class RequestSubmitted:
    """A request entered the batcher's queue (only for detailed observers)."""

    rows: int
    queue_rows: int


@attrs.frozen(kw_only=True)
class CallStarted:
    """The batcher sends a call to the model server.

    `reason`: full, drain, flush, expected, idle, min, hard or latest; bisect or retry for rows that are sent again.
    """

    rows: int
    reason: str
    oldest_age_s: float
    queue_rows: int
    """Rows that stay behind."""


@attrs.frozen(kw_only=True)
class CallDone:
    """The model server answered a call."""

    rows: int
    seconds: float


@attrs.frozen(kw_only=True)
class CallFailed:
    """A call to the model server failed: its rows have an error, or are sent again."""

    rows: int
    seconds: float
    error: Exception


@attrs.frozen(kw_only=True)
class CallAbandoned:
    """A call in flight was cancelled: all its callers left, or the batcher was closed."""

    rows: int
    seconds: float


# -------------------------------------------------------------------------------------------------------- endpoints


@attrs.frozen(kw_only=True)
class CallRerouted:
    """A call failed at one endpoint and goes to another."""

    rows: int
    endpoint: str
    """Where it failed."""
    to: str
    error: Exception


@attrs.frozen(kw_only=True)
class EndpointPaused:
    """An endpoint asked to wait: no call goes there meanwhile."""

    endpoint: str
    pause_s: float
    reason: str


@attrs.frozen(kw_only=True)
class EndpointOpened:
    """An endpoint's breaker opened: after so many failures in a row, or one refusal, no call but a probe goes there."""

    endpoint: str
    failures: int
    reason: str


@attrs.frozen(kw_only=True)
class EndpointClosed:
    """An endpoint works again."""

    endpoint: str
    open_s: float


Event: TypeAlias = (
    MessageRefused
    | EmptyBatch
    | BatchOpened
    | BatchJoined
    | StationAnswered
    | BatchClosed
    | BatchDropped
    | BatchWithdrawn
    | LateResult
    | StationTrouble
    | StationBreakerOpened
    | StationBreakerClosed
    | ThreadAbandoned
    | ThreadReturned
    | BatchHandlerTrouble
    | ResultHookTrouble
    | UploadAttempted
    | UploadRetried
    | UploadDone
    | UploadRejected
    | UploadFailed
    | UploadKept
    | UploadsDiverted
    | UploadsResumed
    | OutboxDelivered
    | OutboxRetried
    | OutboxRejected
    | DeadLettersKept
    | StoreBlocked
    | StoreUnblocked
    | StateMovedAside
    | PartitionsAssigned
    | PartitionsRevoked
    | PartitionsLost
    | OffsetsCommitted
    | SourceTrouble
    | SourceRecovered
    | SourcePaused
    | RequestSubmitted
    | CallStarted
    | CallDone
    | CallFailed
    | CallAbandoned
    | CallRerouted
    | EndpointPaused
    | EndpointOpened
    | EndpointClosed
)
