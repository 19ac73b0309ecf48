"""What a station's past says of its next job. Pure: the clock is an argument.

1. Its service time is a moving mean over its answers. A waiting job that has less time left than that cannot end in
   time: it is hopeless, and given back unstarted. Oldest first would otherwise start every job just too late, for good,
   once a station hung. A job that finds its station idle is never hopeless: whenever everything that waits was given
   back, the next job to come is the trial that lets the mean recover.
2. A job that was cancelled at its limit is a strike if it had a fair chance: twice what the station usually takes, or
   at least half of its batch's time. If it had less than twice the usual, the station may have become slower: the mean
   rises, so that the next jobs that are started have a better chance.
3. So many strikes in a row open the station's breaker; its next answer closes it. What was cancelled before its limit
   (its batch closed by quorum, was dropped or withdrawn) says nothing.
"""

from __future__ import annotations

from typing import Final

import attrs

from stationmaster.breaker import Breaker

_NEW_SHARE: Final = 0.2  # of the latest job in the mean: about the last ten count
_FAIR: Final = 2.0  # times the usual service time: who needs longer than that hangs
_LEAST_FAIR_S: Final = 0.05  # a loop that is busy for a moment is no station's fault
_MORE: Final = 1.5  # times what a job had: a guess at what it needs, so that few guesses suffice


@attrs.define(eq=False)
class StationHealth:
    """Of one station, which is one itself: an object beside it would be one more that is cold when its job comes."""

    mean_s: float | None = attrs.field(default=None, init=False)
    """Moving mean of its service time; None while nothing is known."""
    breaker: Breaker | None = attrs.field(default=None, init=False)
    """None while it is healthy: it was not cancelled since its last answer."""

    def measure(self, seconds: float) -> None:
        """Take note of a service time."""
        if self.mean_s is None:
            self.mean_s = seconds
        else:
            self.mean_s += _NEW_SHARE * (seconds - self.mean_s)

    def recover(self, now: float) -> float | None:
        """Take note that it answered.

        Returns:
            If that closes its breaker: for how long it was open.
        """
        breaker, self.breaker = self.breaker, None
        return None if breaker is None else breaker.succeed(now)

    def trouble(self, *, failures: int, probe_s: float) -> Breaker:
        """Return its breaker: it was cancelled, and is not healthy before its next answer."""
        if self.breaker is None:
            self.breaker = Breaker(failures=failures, probe_s=probe_s)
        return self.breaker

    def is_strike(self, had_s: float, *, fresh: bool) -> bool:
        """Take note that a job was cancelled at its limit; return whether that is the station's own fault.

        Args:
            had_s: from its start to its limit.
            fresh: it had at least half of its batch's time, or all that any job may have.
        """
        if self.mean_s is not None and had_s >= max(_FAIR * self.mean_s, _LEAST_FAIR_S):
            return True
        if self.mean_s is not None or not fresh:
            self.mean_s = max(self.mean_s or 0.0, _MORE * had_s)
        return fresh

    def give_up_probe(self) -> None:
        """Take note that a job under way, if any, ended without saying anything: it was no probe."""
        if self.breaker is not None:
            self.breaker.give_up(is_probe=self.breaker.probing)
