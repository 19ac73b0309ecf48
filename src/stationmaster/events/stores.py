"""Outbox and dead letters: what is kept, and what leaves the outbox."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import attrs

if TYPE_CHECKING:
    from stationmaster.batch import DeadLetter


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


StoreEvent: TypeAlias = (
    OutboxDelivered
    | OutboxRetried
    | OutboxRejected
    | DeadLettersKept
    | StoreBlocked
    | StoreUnblocked
    | StateMovedAside
)
