"""What is known of one endpoint: how busy it is, how fast, and whether it may be asked. Pure: `now` is an argument."""

from __future__ import annotations

import math
from math import inf
from typing import TYPE_CHECKING, Final

import attrs

from stationmaster.errors import EmbedderBusyError, EmbedderRefusedError
from stationmaster.events import EndpointClosed, EndpointOpened, EndpointPaused

if TYPE_CHECKING:
    from random import Random

    from stationmaster.abc import Embedder
    from stationmaster.breaker import Breaker, BreakerState
    from stationmaster.errors import EmbedderError

_NEW_SHARE: Final = 0.2  # of the latest call in what an endpoint usually takes
# After so long without a call it counts as twice as fast: so a slow one is tried again.
_FADES_S: Final = 30.0
# When a busy server names no time; doubles with each such answer in a row.
_FIRST_PAUSE_S: Final = 0.1
_LONGEST_PAUSE_S: Final = 30.0
# A probe may take so many times the usual, doubled after each probe that failed.
_PATIENCE: Final = 4.0
_LEAST_PATIENCE_S: Final = 0.5


@attrs.frozen(kw_only=True)
class EndpointStatistics:
    """A look at one endpoint. Counters begin when it is opened."""

    endpoint: str
    state: BreakerState
    open_s: float
    """How long no call will go because of its breaker; 0 while a probe is due or under way."""
    paused_s: float
    """How long no call will go because it asked to wait."""
    in_flight: int
    abandoned: int
    """Calls that were cancelled and are believed to be computed still."""
    calls: int
    failures: int
    """Calls that failed here, whatever became of them elsewhere; refused texts are none."""
    failures_in_a_row: int
    seconds: float | None
    """What a call usually takes; None before the first answer."""
    last_trouble: str
    """What the last failure said; empty before the first."""


@attrs.define(eq=False)
class Endpoint:
    """One embedder, and what is known of it."""

    name: str
    embedder: Embedder
    breaker: Breaker
    in_flight: int = attrs.field(default=0, init=False)
    seconds: float | None = attrs.field(default=None, init=False)
    """What a call usually takes."""
    last_trouble: str = attrs.field(default="", init=False)
    _paused_until: float = attrs.field(default=-inf, init=False)
    _busy_in_a_row: int = attrs.field(default=0, init=False)
    _calls: int = attrs.field(default=0, init=False)
    _failures: int = attrs.field(default=0, init=False)
    _answered_at: float = attrs.field(default=-inf, init=False)
    _abandoned: list[float] = attrs.field(factory=list, init=False)
    """When calls that were cancelled should be over."""

    # ------------------------------------------------------------------------------------------------ before a call

    def ready_at(self) -> float:
        """Return from when on it may be asked; infinity while the outcome of a probe is awaited."""
        return max(self.breaker.next_at, self._paused_until)

    def shut_until(self, now: float) -> float | None:
        """Return until when nobody may ask it; None if one may, now or as soon as its probe is back."""
        ready_at = self.ready_at()
        return ready_at if now < ready_at < inf else None

    def load(self, now: float) -> int:
        """Return how many calls it works on: those under way, and abandoned ones that should not be over yet."""
        self._abandoned = [end for end in self._abandoned if now < end]
        return self.in_flight + len(self._abandoned)

    def frees_at(self) -> float:
        """Return when the first abandoned call should be over."""
        return min(self._abandoned, default=inf)

    def believed_s(self, now: float) -> float:
        """Return what a call takes as far as that is still believed: 0 if it was never measured."""
        return (self.seconds or 0.0) * self._freshness(now)

    def patience_s(self) -> float:
        """Return after how long a call without an answer counts as hanging."""
        usual_s = max(_PATIENCE * (self.seconds or 0.0), _LEAST_PATIENCE_S)
        return math.ldexp(usual_s, min(self.breaker.failed_probes, 20))

    # ------------------------------------------------------------------------------------------------- during and after

    def begin(self) -> bool:
        """Take a slot; return whether this call is a probe."""
        self.in_flight += 1
        self._calls += 1
        return self.breaker.begin()

    def answered(self, now: float, *, began: float) -> EndpointClosed | None:
        """Take note of vectors."""
        seconds = now - began
        if self.seconds is None:
            self.seconds = seconds
        old_share = (1 - _NEW_SHARE) * self._freshness(now)
        self.seconds = old_share * self.seconds + (1 - old_share) * seconds
        self._answered_at = now
        return self.lives(now)

    def lives(self, now: float) -> EndpointClosed | None:
        """Take note of an answer that shows that it works."""
        self._busy_in_a_row = 0
        return self._close(now)

    def failed(
        self, now: float, error: EmbedderError, *, is_probe: bool, jitter: Random
    ) -> EndpointOpened | EndpointPaused | None:
        """Take note of a failure, and what it means for later calls."""
        if isinstance(error, EmbedderBusyError):
            return self._pause(now, error, is_probe=is_probe, jitter=jitter)
        refused = isinstance(error, EmbedderRefusedError)
        return self._count(now, str(error), is_probe=is_probe, refused=refused)

    def abandoned(self, now: float, *, began: float, is_probe: bool) -> EndpointOpened | None:
        """Take note that a call was cancelled: its server goes on with it, or hangs if it took far too long already.

        Without the latter a server that hangs for longer than callers wait would never count as failing.
        """
        if now - began >= self.patience_s():
            reason = f"{self.name} was given up after {now - began:.3g} s without an answer"
            return self._count(now, reason, is_probe=is_probe)
        if self.seconds is not None:
            self._abandoned.append(began + self.seconds)
        self.breaker.give_up(is_probe=is_probe)
        return None

    def _count(
        self, now: float, reason: str, *, is_probe: bool, refused: bool = False
    ) -> EndpointOpened | None:
        self._failures += 1
        self.last_trouble = reason
        if not self.breaker.fail(now, is_probe=is_probe, refused=refused):
            return None
        return EndpointOpened(endpoint=self.name, failures=self.breaker.in_a_row, reason=reason)

    def _freshness(self, now: float) -> float:
        return math.exp2((self._answered_at - now) / _FADES_S)

    def _pause(
        self, now: float, error: EmbedderBusyError, *, is_probe: bool, jitter: Random
    ) -> EndpointPaused:
        """Leave it alone for as long as it asks, half a minute at most: one wild header must not cost an hour.

        Its breaker learns nothing: a probe has to come again.
        """
        self._failures += 1
        self.last_trouble = str(error)
        pause_s = error.retry_after_s
        if not pause_s:  # nor is none a time: it may be a date by a clock that is late
            longest_s = min(_FIRST_PAUSE_S * 2 ** min(self._busy_in_a_row, 20), _LONGEST_PAUSE_S)
            pause_s = longest_s * jitter.uniform(0.5, 1.0)
        self._busy_in_a_row += 1
        pause_s = min(pause_s, _LONGEST_PAUSE_S)
        self._paused_until = max(self._paused_until, now + pause_s)
        self.breaker.give_up(is_probe=is_probe)
        return EndpointPaused(endpoint=self.name, pause_s=pause_s, reason=str(error))

    def _close(self, now: float) -> EndpointClosed | None:
        open_s = self.breaker.succeed(now)
        return None if open_s is None else EndpointClosed(endpoint=self.name, open_s=open_s)

    # ----------------------------------------------------------------------------------------------------- for a look

    def state(self, now: float) -> str:
        """Return in a word whether it may be asked."""
        return "paused" if now < self._paused_until else self.breaker.state(now)

    def statistics(self, now: float) -> EndpointStatistics:
        """Return a look at it."""
        breaker = self.breaker
        return EndpointStatistics(
            endpoint=self.name,
            state=breaker.state(now),
            open_s=0.0 if breaker.probing else max(breaker.next_at - now, 0.0),
            paused_s=max(self._paused_until - now, 0.0),
            in_flight=self.in_flight,
            abandoned=self.load(now) - self.in_flight,
            calls=self._calls,
            failures=self._failures,
            failures_in_a_row=breaker.in_a_row,
            seconds=self.seconds,
            last_trouble=self.last_trouble,
        )
