"""Every error that stationmaster raises, and the one helper that lets a lone error leave a nursery as itself.

    StationmasterError
    |-- ConfigError                    the configuration is wrong; lists every fault with its path
    |-- SourceError                    the source of messages cannot go on
    |-- UploadFailedError              a batch could not be delivered within its limit
    |-- StoreError                     the outbox or the dead letters cannot take anything now: try again later
    |-- BatcherError                   the request batcher did not take, or gave up on, this request
    |   |-- QueueFullError
    |   |-- RequestTooLargeError
    |   |-- DeadlineUnreachableError
    |   |-- DeadlineExceededError
    |   `-- BatcherClosedError
    `-- EmbedderError                  the model server failed this call or this row
        |-- RowRejectedError           it refuses the input itself: trying again cannot help
        |-- EmbedderBusyError          429 or 503: try again after a while
        |-- EmbedderRefusedError       401, 403, 404: a wrong key, URL or model name
        |-- EmbedderUnavailableError   connection lost, time-out, other 5xx
        `-- ProtocolError              the answer breaks the contract (count, index, dimension, NaN, not JSON)

Facts are attributes; the message says what happened, to which thing, and what to do.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


class StationmasterError(Exception):
    """Root of the tree: catches everything that stationmaster raises on purpose."""


class ConfigError(StationmasterError):
    """The configuration is wrong.

    Attributes:
        faults: one line per fault, each beginning with its path (`batch.deadline_s: ...`).
    """

    def __init__(self, faults: Sequence[str]) -> None:
        self.faults: tuple[str, ...] = tuple(faults)
        super().__init__("\n".join(self.faults))


class SourceError(StationmasterError):
    """The source of messages cannot go on (a fatal client error, an unreadable file)."""


class UploadFailedError(StationmasterError):
    """A batch could not be delivered within its limit; its offsets stay uncommitted.

    Attributes:
        batch_id: the batch.
        attempts: how many times it was sent.
        limit_s: seconds that were allowed for all attempts together.
        last_answer: what the last attempt met.
    """

    def __init__(self, *, batch_id: str, attempts: int, limit_s: float, last_answer: str) -> None:
        self.batch_id = batch_id
        self.attempts = attempts
        self.limit_s = limit_s
        self.last_answer = last_answer
        super().__init__(
            f"batch {batch_id} was not accepted within {limit_s:g} s ({attempts} attempts, last: {last_answer}); "
            "it is not committed and comes again after a restart. Check the upload target, then start again"
        )


class StoreError(StationmasterError):
    """The outbox or the dead letters cannot take anything now; what was to be kept is still its owner's.

    Always passing: room comes back, a disk is emptied, a broker returns. Try again later.

    Attributes:
        kind: a short bounded name: full (the configured bound), disk-full, disk-error or broker.
    """

    def __init__(self, message: str, *, kind: str) -> None:
        self.kind = kind
        super().__init__(message)


class BatcherError(StationmasterError):
    """The request batcher did not take this request, or gave it up."""


class QueueFullError(BatcherError):
    """The batcher's queue is full; nothing was queued.

    Attributes:
        capacity: rows that fit.
        retry_after_s: seconds after which, at the measured rate, there should be room.
    """

    def __init__(self, *, capacity: int, retry_after_s: float) -> None:
        self.capacity = capacity
        self.retry_after_s = retry_after_s
        super().__init__(
            f"the queue of {capacity} rows is full; try again in {retry_after_s:.3g} s"
        )


class RequestTooLargeError(BatcherError):
    """The request can never fit: more rows or bytes than the batcher may ever hold."""


class DeadlineUnreachableError(BatcherError):
    """Refused at once: even the best estimate ends after the deadline."""


class DeadlineExceededError(BatcherError):
    """The deadline passed while the request was queued or in flight."""


class BatcherClosedError(BatcherError):
    """The batcher is closing or closed, or its task died (then the cause is chained)."""


class EmbedderError(StationmasterError):
    """The model server failed this call, or one row of it."""


class RowRejectedError(EmbedderError):
    """The model server refuses this input (400, 413, 422); its words are in the message."""


class EmbedderBusyError(EmbedderError):
    """The model server asks to wait (429, 503).

    Attributes:
        retry_after_s: seconds it asked for, or None if it did not say.
    """

    def __init__(self, message: str, *, retry_after_s: float | None = None) -> None:
        self.retry_after_s = retry_after_s
        super().__init__(message)


class EmbedderRefusedError(EmbedderError):
    """The model server refuses us (401, 403, 404): key, URL or model name is wrong."""


class EmbedderUnavailableError(EmbedderError):
    """The model server cannot be reached, broke the connection, timed out or answered 5xx."""


class ProtocolError(EmbedderError):
    """The model server's answer breaks the contract; nothing of it is used."""


@contextmanager
def plain_errors() -> Iterator[None]:
    """Let a lone error leave a nursery as itself; groups of several errors stay groups.

    For the two public doors only: inside, a nursery's group is what it is.
    """
    lone: BaseException | None = None
    try:
        yield
    except BaseExceptionGroup as group:
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
            error = error.exceptions[0]
        if error is group:
            raise
        lone = error
    if lone is not None:
        context = lone.__context__
        try:
            raise lone
        finally:
            lone.__context__ = context  # not the group that held it
