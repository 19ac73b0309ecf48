"""Several model servers as one: which of them is asked, and which is left alone."""

from __future__ import annotations

from typing import TypeAlias

import attrs


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


EndpointEvent: TypeAlias = CallRerouted | EndpointPaused | EndpointOpened | EndpointClosed
