"""When a batch of rows leaves: the policy, the rule, and the model of what a call costs. Pure: no task, no clock.

All times are on trio's clock, in seconds. The age of a queue is the waiting time of its oldest live row.

    no free sender -> nothing is sent; rows keep arriving into the batch that leaves next
    free sender    -> send if any of
       FULL       rows >= max_batch_rows or bytes >= max_batch_bytes
       IDLE       the policy sends when idle and nothing is in flight
       MIN        rows >= min_batch_rows and age >= max_wait_s
       HARD       age >= hard_timeout_s
       LATEST     now >= earliest due time - cautious estimate of the call - margin_s
       DRAIN      the batcher is closing
       FLUSH      somebody asked, and rows of that moment still wait
       EXPECTED   the announced rows are all here (while they are awaited, IDLE and MIN hold back)
    else sleep until the one instant at which a rule will fire, or an arrival

The instant that is slept for and the comparison made at that instant are the same expression: `now - then >= wait`
may be false at exactly `then + wait`, and a timer would spin.
"""

from __future__ import annotations

import math
from typing import Final, Literal, TypeAlias

import attrs

from stationmaster.errors import ConfigError

SendReason: TypeAlias = Literal[
    "full", "idle", "min", "hard", "latest", "drain", "flush", "expected"
]
"""Why a batch left."""

MEASURED_AFTER: Final = 8
"""Calls after which the cost model believes itself."""

_MEMORY = 0.95  # weight of a call after each later one: about the last twenty count


@attrs.frozen(kw_only=True)
class BatchPolicy:
    """The batcher's numbers. Durations in seconds, sizes in bytes of UTF-8.

    The defaults send at once when nothing is in flight and gather rows only while something is.

    Raises:
        ConfigError: they contradict each other; every fault is listed.
    """

    max_batch_rows: int = 32
    """Rows of one call at most."""
    min_batch_rows: int = 1
    """Rows that make a batch worth sending after `max_wait_s`; fewer wait for `hard_timeout_s`."""
    max_wait_s: float = 0.005
    """How long rows may be gathered once there are enough of them."""
    hard_timeout_s: float = 0.05
    """How long the oldest row may wait for company, counted from its arrival; infinity only with `send_when_idle`."""
    send_when_idle: bool = True
    """Send whatever is there when nothing is in flight."""
    max_batch_bytes: int = 1 << 20
    """Text of one call at most; a longer single text is refused. Model servers take bodies of 2 MB by default."""
    max_queue_rows: int = 1024
    """Rows that may wait; one more is refused."""
    max_queue_bytes: int = 64 << 20
    """Text that may wait."""
    max_in_flight: int = 4
    """Calls at the same time."""
    grace_s: float = 5.0
    """How long closing waits for rows that are queued or in flight."""
    start_estimate_s: float = 0.1
    """What a call is believed to take until eight were measured."""
    margin_s: float = 0.005
    """How much earlier than strictly needed a batch leaves to be answered by its earliest deadline."""
    patience_s: float = 30.0
    """A row without a nearer deadline counts as due this long after its arrival: for its rank in the queue (so that
    nobody overtakes it for ever), for LATEST, and for trying again. Also the longest pause that a server may ask for."""

    def __attrs_post_init__(self) -> None:
        faults = [
            *(
                f"{name}: must be a whole number of at least 1, not {value!r}"
                for name, value in self._counts().items()
                if type(value) is not int or value < 1
            ),
            *(
                f"{name}: must be a number of seconds of at least 0, not {value!r}"
                for name, value in self._durations().items()
                if not value >= 0  # also true for NaN
            ),
            *(
                f"{name}: must not be infinite"
                for name, value in self._durations().items()
                if value == math.inf and name not in {"max_wait_s", "hard_timeout_s"}
            ),
        ]
        faults += (
            f"{smaller}: must not be greater than {greater} ({getattr(self, smaller)} > {getattr(self, greater)})"
            for smaller, greater in (
                ("min_batch_rows", "max_batch_rows"),
                ("max_wait_s", "hard_timeout_s"),
                ("max_batch_rows", "max_queue_rows"),
                ("max_batch_bytes", "max_queue_bytes"),
            )
            if getattr(self, smaller) > getattr(self, greater)
        )
        if self.hard_timeout_s == math.inf and not self.send_when_idle:
            faults.append(
                "hard_timeout_s: must be finite without send_when_idle, else a row could wait for ever"
            )
        if faults:
            raise ConfigError(faults)

    def _counts(self) -> dict[str, int]:
        return {
            name: getattr(self, name)
            for name in (
                "max_batch_rows",
                "min_batch_rows",
                "max_batch_bytes",
                "max_queue_rows",
                "max_queue_bytes",
                "max_in_flight",
            )
        }

    def _durations(self) -> dict[str, float]:
        return {
            name: getattr(self, name)
            for name in (
                "max_wait_s",
                "hard_timeout_s",
                "grace_s",
                "start_estimate_s",
                "margin_s",
                "patience_s",
            )
        }

    @classmethod
    def seed_compat(cls) -> BatchPolicy:
        """Return the classic dual time-outs: min 4, max 16, 50 ms, then 200 ms more, a queue of ten full batches."""
        return cls(
            min_batch_rows=4,
            max_batch_rows=16,
            max_wait_s=0.05,
            hard_timeout_s=0.25,
            send_when_idle=False,
            max_queue_rows=160,
        )


DEFAULT_POLICY: Final = BatchPolicy()


def decide(
    policy: BatchPolicy,
    *,
    now: float,
    rows: int,
    size_bytes: int,
    oldest: float,
    earliest_due: float,
    estimate_s: float,
    idle: bool,
    draining: bool = False,
    released: tuple[float, SendReason] = (-math.inf, "flush"),
    held_until: float = -math.inf,
) -> tuple[SendReason | None, float]:
    """Decide whether a free sender should take a batch now.

    Args:
        policy: the numbers.
        now: the time.
        rows: live rows that wait, at least one.
        size_bytes: their text.
        oldest: arrival of the oldest.
        earliest_due: when the most urgent is due.
        estimate_s: cautious estimate of the call that would leave.
        idle: nothing is in flight.
        draining: the batcher is closing.
        released: rows that arrived until this instant leave at once, for this reason.
        held_until: announced rows are awaited until this instant.

    Returns:
        The reason and `now`, or None and the instant (maybe infinity) at which a rule will fire if nothing happens.
    """
    if rows >= policy.max_batch_rows or size_bytes >= policy.max_batch_bytes:
        return "full", now
    instants: list[tuple[float, SendReason]] = []
    if idle and policy.send_when_idle:
        instants.append((held_until, "idle"))
    if rows >= policy.min_batch_rows:
        instants.append((max(oldest + policy.max_wait_s, held_until), "min"))
    instants.append((oldest + policy.hard_timeout_s, "hard"))
    instants.append((earliest_due - estimate_s - policy.margin_s, "latest"))
    if draining:
        instants.append((now, "drain"))
    if oldest <= released[0]:
        instants.append((now, released[1]))
    for instant, reason in instants:
        if instant <= now:
            return reason, now
    return None, min(instants)[0]


@attrs.define(eq=False)
class CostModel:
    """What a call takes: `fixed_s + per_row_s x rows`, by least squares over recent calls, neither part negative.

    While all calls have the same number of rows the cost is taken as constant.
    """

    start_estimate_s: float
    """Believed until `MEASURED_AFTER` calls were measured."""
    samples: int = attrs.field(default=0, init=False)
    fixed_s: float = attrs.field(default=0.0, init=False)
    per_row_s: float = attrs.field(default=0.0, init=False)
    guard_s: float = attrs.field(default=0.0, init=False)
    """Twice the spread around the line: about nineteen calls of twenty end within line + guard."""
    _weight: float = attrs.field(default=0.0, init=False)
    _rows: float = attrs.field(default=0.0, init=False)
    _seconds: float = attrs.field(default=0.0, init=False)
    _rows_rows: float = attrs.field(default=0.0, init=False)
    _rows_seconds: float = attrs.field(default=0.0, init=False)
    _misses: float = attrs.field(default=0.0, init=False)

    @property
    def measured(self) -> bool:
        """Whether enough calls were measured."""
        return self.samples >= MEASURED_AFTER

    def learn(self, *, rows: int, seconds: float) -> None:
        """Take note of a call that was answered."""
        self.samples += 1
        self._weight = self._weight * _MEMORY + 1
        self._rows = self._rows * _MEMORY + rows
        self._seconds = self._seconds * _MEMORY + seconds
        self._rows_rows = self._rows_rows * _MEMORY + rows * rows
        self._rows_seconds = self._rows_seconds * _MEMORY + rows * seconds
        spread = self._weight * self._rows_rows - self._rows * self._rows
        slope = 0.0
        if spread > 1e-9 * self._weight * self._rows_rows:
            slope = (self._weight * self._rows_seconds - self._rows * self._seconds) / spread
        fixed = (self._seconds - slope * self._rows) / self._weight
        if slope < 0:
            slope, fixed = 0.0, self._seconds / self._weight
        elif fixed < 0:
            slope, fixed = self._rows_seconds / self._rows_rows, 0.0
        self.fixed_s, self.per_row_s = fixed, slope
        miss = seconds - fixed - slope * rows
        self._misses = self._misses * _MEMORY + miss * miss
        self.guard_s = 2 * math.sqrt(self._misses / self._weight)

    def estimate(self, rows: int) -> float:
        """Estimate the seconds of a call with that many rows."""
        if self.samples < MEASURED_AFTER:
            return self.start_estimate_s
        return self.fixed_s + self.per_row_s * rows

    def optimistic(self, rows: int) -> float:
        """Estimate the seconds that such a call takes nearly always; 0 while nothing is known."""
        if self.samples < MEASURED_AFTER:
            return 0.0
        return max(self.fixed_s + self.per_row_s * rows - self.guard_s, 0.0)

    def cautious(self, rows: int) -> float:
        """Estimate the seconds within which such a call is answered nearly always."""
        if self.samples < MEASURED_AFTER:
            return self.start_estimate_s
        return self.fixed_s + self.per_row_s * rows + self.guard_s
