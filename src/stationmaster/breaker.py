"""A circuit breaker: whether someone who failed may be asked. Pure: the clock is an argument.

    closed      calls go. `failures` failed calls in a row, or one refusal (a wrong key, URL or model name): open
    open        no call goes until `probe_s` passed
    half-open   ONE call goes, the probe; the others wait for its outcome. It fails: open for another `probe_s`. Any
                other answer: closed. It is given up without an outcome: half-open, and the next call is the probe

A call that was under way when the breaker opened can close it, but never prolong it.
"""

from __future__ import annotations

from math import inf
from typing import Literal, TypeAlias

import attrs

BreakerState: TypeAlias = Literal["closed", "open", "half-open"]


@attrs.define(eq=False, kw_only=True)
class Breaker:
    """One for one model server or one station. Times are seconds of one clock that never jumps."""

    failures: int
    probe_s: float
    in_a_row: int = attrs.field(default=0, init=False)
    """Failures since the last success."""
    refused: bool = attrs.field(default=False, init=False)
    """It was opened by a refusal: waiting does not help, somebody must mend something."""
    probing: bool = attrs.field(default=False, init=False)
    """A probe is under way."""
    failed_probes: int = attrs.field(default=0, init=False)
    """Since it opened."""
    _opened_at: float | None = attrs.field(default=None, init=False)
    _probe_at: float = attrs.field(default=-inf, init=False)

    def state(self, now: float) -> BreakerState:
        """Return the state's name."""
        if self._opened_at is None:
            return "closed"
        return "half-open" if now >= self._probe_at else "open"

    @property
    def next_at(self) -> float:
        """From when on a call may go; infinity while the outcome of a probe is awaited."""
        return inf if self.probing else self._probe_at

    def begin(self) -> bool:
        """Take note that a call goes, which `next_at` allows; return whether it is the probe."""
        self.probing = self._opened_at is not None
        return self.probing

    def succeed(self, now: float) -> float | None:
        """Take note of a sign of life.

        Returns:
            If that closes the breaker: for how long it was open.
        """
        opened_at, self._opened_at = self._opened_at, None
        self._probe_at = -inf
        self.in_a_row = self.failed_probes = 0
        self.probing = self.refused = False
        return None if opened_at is None else now - opened_at

    def fail(self, now: float, *, is_probe: bool, refused: bool = False) -> bool:
        """Take note of a failure; return whether that opens the breaker (again after a probe is not again)."""
        self.in_a_row += 1
        if self._opened_at is None:
            if not refused and self.in_a_row < self.failures:
                return False
            self._opened_at = now
            self._probe_at = now + self.probe_s
            self.refused = refused
            return True
        if is_probe:
            self.probing = False
            self.failed_probes += 1
            self._probe_at = now + self.probe_s
            self.refused = refused
        return False

    def give_up(self, *, is_probe: bool) -> None:
        """Take note that a call ended without a verdict on the endpoint: cancelled, or a bug of its caller."""
        if is_probe:
            self.probing = False
