"""The deadlines that the batcher keeps for callers without a scope of their own."""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stationmaster.batcher.callers import Caller

GRAIN_S: Final = 0.01
"""So late they may strike."""
_NEVER_S: Final = 1e300  # divided by the grain still a number


class Expiries:
    """Deadlines that no scope of the caller keeps, in buckets: each strikes at most 10 ms late, and costs no scope."""

    __slots__ = ("_buckets",)

    def __init__(self) -> None:
        self._buckets: dict[int, dict[Caller, None]] = {}

    def add(self, caller: Caller, deadline: float) -> float:
        """Keep a caller's deadline.

        Returns:
            The instant at which it will strike, or infinity if that of another is the same.
        """
        key = _key(deadline)
        bucket = self._buckets.get(key)
        if bucket is not None:
            bucket[caller] = None
            return inf
        self._buckets[key] = {caller: None}
        return key * GRAIN_S

    def discard(self, caller: Caller, deadline: float) -> None:
        """Keep it no more; fine if it struck."""
        key = _key(deadline)
        bucket = self._buckets.get(key)
        if bucket is not None:
            bucket.pop(caller, None)
            if not bucket:
                del self._buckets[key]

    def next(self) -> float:
        """Return the next instant at which a deadline strikes; infinity if none is kept."""
        return min(self._buckets, default=inf) * GRAIN_S

    def pop(self, now: float) -> Sequence[Caller]:
        """Take the callers whose instant has come, earliest bucket first."""
        due = sorted(key for key in self._buckets if key * GRAIN_S <= now)
        return [caller for key in due for caller in self._buckets.pop(key)]


def _key(deadline: float) -> int:
    return int(min(deadline, _NEVER_S) / GRAIN_S) + 1
