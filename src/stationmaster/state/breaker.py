"""Whether the target is known to be down, and when to ask it again. Pure: the clock is an argument.

    closed      uploads go to the target. `failures` passing failures in a row, of whatever upload: open. One batch
                out of the outbox that fails again and again counts once: that may be the batch
    open        uploads are diverted. After the back-off ONE batch out of the outbox is the probe: accepted or rejected:
                closed; else the back-off doubles, up to its limit
    on trial    the back-off passed and there was nothing to probe with: uploads are let through again, and the first
                answer decides: one failure opens it (the back-off doubles), anything else closes it

A rejection shows life as well: who refuses one batch for good takes others. Answers to uploads that were under way when
it opened can close it, but never prolong it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import attrs

from stationmaster.abc import Accepted, Rejected, TryAgain, Unavailable
from stationmaster.events import UploadsDiverted, UploadsResumed

if TYPE_CHECKING:
    from random import Random

    from stationmaster.abc import UploadAnswer

_FIRST_S: Final = 0.5


@attrs.frozen(kw_only=True)
class Backoff:
    """Growing, jittered pauses between attempts: 0.5 s, doubled each time, up to `max_s`."""

    max_s: float
    jitter: Random

    def pause_s(self, answer: TryAgain | Unavailable, *, attempt: int) -> float:
        """Return the pause after this attempt (from 1); what `Retry-After` asked for is honoured up to `max_s`."""
        pause: float = min(_FIRST_S * 2 ** min(attempt - 1, 30), self.max_s)
        pause *= self.jitter.uniform(0.5, 1.0)
        if isinstance(answer, TryAgain) and answer.retry_after_s is not None:
            pause = max(pause, answer.retry_after_s)
        return min(pause, self.max_s)


@attrs.define(eq=False, kw_only=True)
class Breaker:
    """One for one target. Times are seconds of one clock that never jumps."""

    failures: int
    backoff: Backoff
    is_open: bool = attrs.field(default=False, init=False)
    probe_at: float = attrs.field(default=0.0, init=False)
    """While open: when the next probe may go."""
    _in_a_row: int = attrs.field(default=0, init=False)
    _counted: set[str] = attrs.field(factory=set, init=False)
    """Batches out of the outbox among these; no more than `failures`."""
    _opened: int = attrs.field(default=0, init=False)
    """How often since it was last closed."""
    _down_since: float | None = attrs.field(default=None, init=False)

    def note(
        self, answer: UploadAnswer, /, *, now: float, row: str | None = None, is_probe: bool = False
    ) -> UploadsDiverted | UploadsResumed | None:
        """Take note of what the target answered, to a direct upload or to a row of the outbox.

        Returns:
            What there is to be said about it.
        """
        if isinstance(answer, Accepted | Rejected):
            return self._close(now)
        if self.is_open and not is_probe:
            return None
        if row is not None and not is_probe:
            if row in self._counted:
                return None
            self._counted.add(row)
        self._in_a_row += 1
        if self._in_a_row < self.failures:
            return None
        self.is_open = True
        self._opened += 1
        self.probe_at = now + self.backoff.pause_s(answer, attempt=self._opened)
        if self._down_since is not None:
            return None
        self._down_since = now
        return UploadsDiverted(reason=answer.reason, refused=isinstance(answer, Unavailable))

    def try_directly(self) -> None:
        """Let uploads through on trial: there is nothing to probe with."""
        self.is_open = False
        self._in_a_row = self.failures - 1
        self._counted.clear()

    def probe_now(self, now: float) -> None:
        """Wait no longer: an operator asks for it."""
        self.probe_at = min(self.probe_at, now)

    def _close(self, now: float) -> UploadsResumed | None:
        down_since, self._down_since = self._down_since, None
        self.is_open = False
        self._in_a_row = self._opened = 0
        self._counted.clear()
        return None if down_since is None else UploadsResumed(diverted_s=now - down_since)
