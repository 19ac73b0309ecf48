"""When a batch of rows leaves: the numbers and the rule. Pure: no task, no clock, no state.

All times are on trio's clock, in seconds. The age of a queue is the waiting time of its oldest live row.

    no free sender -> nothing is sent; rows keep arriving into the batch that leaves next
    free sender    -> send if any of (the first that holds names the call)
       FULL       rows >= max_batch_rows, bytes >= max_batch_bytes or tokens >= max_batch_tokens
       DRAIN      the batcher is closing
       FLUSH      somebody asked, and rows of that moment still wait
       EXPECTED   the announced rows are all here (while they are awaited, IDLE and MIN hold back)
       IDLE       the policy sends when idle and nothing is in flight
       MIN        rows >= min_batch_rows and age >= max_wait_s
       HARD       age >= hard_timeout_s
       LATEST     now >= when the most urgent row is due - cautious estimate of the call - margin_s
    else sleep until the one instant at which a rule will fire, or an arrival

The instant that is slept for and the comparison made at that instant are the same expression: `now - then >= wait`
may be false at exactly `then + wait`, and a timer would spin.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final, Literal, Protocol, TypeAlias

import attrs

from stationmaster.errors import ConfigError

if TYPE_CHECKING:
    from stationmaster.batcher.cost import CostModel

SendReason: TypeAlias = Literal[
    "full", "drain", "flush", "expected", "idle", "min", "hard", "latest"
]
"""Why a batch left."""

_COUNTS: Final = (
    "max_batch_rows",
    "min_batch_rows",
    "max_batch_bytes",
    "max_batch_tokens",
    "max_queue_rows",
    "max_queue_bytes",
    "max_in_flight",
)
_DURATIONS: Final = (
    "max_wait_s",
    "hard_timeout_s",
    "grace_s",
    "start_estimate_s",
    "margin_s",
    "patience_s",
)
_MAY_BE_INFINITE: Final = {"max_wait_s", "hard_timeout_s"}
_IN_ORDER: Final = (
    ("min_batch_rows", "max_batch_rows"),
    ("max_wait_s", "hard_timeout_s"),
    ("max_batch_rows", "max_queue_rows"),
    ("max_batch_bytes", "max_queue_bytes"),
)


@attrs.frozen(kw_only=True)
class BatchPolicy:
    """The batcher's numbers. Durations in seconds, sizes in bytes of UTF-8.

    By default rows leave at once when nothing is in flight, and are gathered only while something is.

    Raises:
        ConfigError: the numbers make no sense, alone or together; every fault is listed.
    """

    max_batch_rows: int = 32
    """Rows of one call at most."""
    min_batch_rows: int = 1
    """Rows that make a call worth sending after `max_wait_s`; fewer wait for `hard_timeout_s`."""
    max_wait_s: float = 0.005
    """How long the oldest row waits for company before `min_batch_rows` are enough."""
    hard_timeout_s: float = 0.05
    """How long it waits in any case, counted from its arrival; infinity only with `send_when_idle`."""
    send_when_idle: bool = True
    """Send what is there when nothing is in flight."""
    max_batch_bytes: int = 1 << 20
    """Text of one call; a single longer text is refused. Servers commonly refuse bodies beyond 2 MB."""
    max_batch_tokens: int | None = None
    """Tokens of one call, as `open_batcher`'s `count_tokens` counts them; a single longer text is refused. None: any
    number, and nothing is counted."""
    max_queue_rows: int = 1024
    """Rows that may wait; more are refused."""
    max_queue_bytes: int = 64 << 20
    """Text that may wait."""
    max_in_flight: int = 4
    """Calls at the same time."""
    grace_s: float = 5.0
    """How long closing waits for rows that are queued or in flight."""
    start_estimate_s: float = 0.1
    """What a call is believed to take until eight were measured."""
    margin_s: float = 0.005
    """How much earlier than need be a batch leaves to be answered when its most urgent row is due."""
    patience_s: float = 30.0
    """A row without a nearer deadline counts as due this long after its arrival: for its rank in the queue (so nobody
    overtakes it for ever), for LATEST, and for trying again. Also the longest pause that a server may ask for."""

    share_identical: bool = False
    """Send texts that are equal once: those of one call, and that of an `embed` while its text is in flight. All who
    asked get the same vector object."""

    def __attrs_post_init__(self) -> None:
        faults: list[str] = []
        for name in _COUNTS:
            value = getattr(self, name)
            if name == "max_batch_tokens" and value is None:
                continue
            if type(value) is not int or value < 1:
                faults.append(f"{name}: must be a whole number of at least 1, not {value!r}")
        for name in _DURATIONS:
            value = getattr(self, name)
            if not value >= 0:  # so that NaN is caught too
                faults.append(f"{name}: must be a number of seconds of at least 0, not {value!r}")
            elif value == math.inf and name not in _MAY_BE_INFINITE:
                faults.append(f"{name}: must be finite")
        for lower, upper in _IN_ORDER:
            low, high = getattr(self, lower), getattr(self, upper)
            if low > high:
                faults.append(f"{lower}: must not be greater than {upper} ({low!r} > {high!r})")
        if self.hard_timeout_s == math.inf and not self.send_when_idle:
            faults.append(
                "hard_timeout_s: must be finite without send_when_idle, else a row could wait for ever"
            )
        if faults:
            raise ConfigError(faults)

    @classmethod
    def seed_compat(cls) -> BatchPolicy:
        """Return the classic dual time-outs: 4 to 16 rows, 50 ms and 200 ms more, a queue of ten full batches."""
        return cls(
            min_batch_rows=4,
            max_batch_rows=16,
            max_wait_s=0.05,
            hard_timeout_s=0.25,
            send_when_idle=False,
            max_queue_rows=160,
        )


class Waiting(Protocol):
    """What the rule needs to know of a queue that is not empty. The last two may cost a look at every row."""

    @property
    def rows(self) -> int:
        """How many live rows wait."""
        ...

    @property
    def size_bytes(self) -> int:
        """How much text."""
        ...

    @property
    def tokens(self) -> int:
        """How many tokens, if they are counted."""
        ...

    @property
    def oldest(self) -> float:
        """Arrival of the oldest."""
        ...

    @property
    def earliest_due(self) -> float:
        """When the most urgent is due."""
        ...


def decide(
    policy: BatchPolicy,
    queue: Waiting,
    *,
    now: float,
    cost: CostModel,
    idle: bool,
    draining: bool = False,
    released: tuple[float, SendReason] = (-math.inf, "flush"),
    held_until: float = -math.inf,
) -> tuple[SendReason | None, float]:
    """Decide whether a free sender should take a batch now.

    Args:
        policy: the numbers.
        queue: the rows that wait, at least one.
        now: the time.
        cost: what a call takes.
        idle: nothing is in flight.
        draining: the batcher is closing.
        released: rows that arrived until this instant leave at once, for this reason.
        held_until: announced rows are awaited until this instant.

    Returns:
        The reason and `now`, or None and the instant (maybe infinity) at which a rule will fire if nothing happens.
    """
    rows = queue.rows
    if (
        rows >= policy.max_batch_rows
        or queue.size_bytes >= policy.max_batch_bytes
        or (policy.max_batch_tokens is not None and queue.tokens >= policy.max_batch_tokens)
    ):
        return "full", now
    if draining:
        return "drain", now
    oldest = queue.oldest
    if oldest <= released[0]:
        return released[1], now
    wake_at = math.inf
    if idle and policy.send_when_idle:
        if held_until <= now:
            return "idle", now
        wake_at = held_until
    if rows >= policy.min_batch_rows:
        instant = max(oldest + policy.max_wait_s, held_until)
        if instant <= now:
            return "min", now
        wake_at = min(wake_at, instant)
    instant = oldest + policy.hard_timeout_s
    if instant <= now:
        return "hard", now
    wake_at = min(wake_at, instant)
    instant = queue.earliest_due - cost.cautious(rows) - policy.margin_s
    if instant <= now:
        return "latest", now
    return None, min(wake_at, instant)
