"""A look at a batcher."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

if TYPE_CHECKING:
    from collections.abc import Mapping


@attrs.frozen(kw_only=True)
class BatcherStatistics:
    """A look at a batcher. Counters begin when it is opened; their unit is the row."""

    queued_rows: int
    queued_bytes: int
    queued_tokens: int
    """0 if the policy has no `max_batch_tokens`."""
    oldest_age_s: float
    """How long the oldest queued row waits; 0 if none does. It grows beyond the policy's `hard_timeout_s` only while
    all senders are busy or the model server asked to wait."""
    calls_in_flight: int
    rows_in_flight: int
    busy_senders: int
    """Of the policy's `max_in_flight`: those with a call, and those that let the server finish an abandoned one."""
    paused_s: float
    """How long nothing will be sent because the model server asked to wait."""
    answered_rows: int
    failed_rows: int
    expired_rows: int
    """A deadline kept by the batcher passed."""
    cancelled_rows: int
    """Their callers were cancelled."""
    refused_rows: int
    """Never queued: the sum of `refusals`."""
    refusals: Mapping[str, int]
    """Rows by the error that refused them: `QueueFullError`, `RequestTooLargeError`, `DeadlineUnreachableError`,
    `DeadlineExceededError`, `BatcherClosedError`."""
    sent_texts: int
    """Each time a text was sent; by the sum of `calls`, the mean size of a call."""
    shared_rows: int
    """Got the vector of an identical row."""
    calls: Mapping[str, int]
    """Calls by reason: those of the rule (`SendReason`), `bisect` and `retry`."""
    abandoned_calls: int
    """All their callers left."""
    call_estimate_s: float
    """What a full call is believed to take."""
