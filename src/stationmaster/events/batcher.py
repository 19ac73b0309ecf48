"""The request batcher: its queue, and its calls to the model server."""

from __future__ import annotations

from typing import TypeAlias

import attrs


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


BatcherEvent: TypeAlias = RequestSubmitted | CallStarted | CallDone | CallFailed | CallAbandoned
