"""How a pipeline cuts, times and bounds its batches; and a moment of one."""

from __future__ import annotations

from typing import get_args

import attrs

from stationmaster.errors import ConfigError
from stationmaster.messages import Limits
from stationmaster.poller import Boundary


@attrs.frozen(kw_only=True)
class PipelineSettings:
    """How batches are cut, timed and bounded. Durations in seconds, sizes in bytes.

    Raises:
        ConfigError: on nonsense, all faults at once.
    """

    by: Boundary = "message"
    deadline_s: float = 5.0
    quorum: float = 1.0
    """0 < quorum <= 1; below 1 a batch closes when that share of its stations answered."""
    max_in_flight: int = 64
    """Open batches, those in upload included."""
    max_in_flight_bytes: int = 64 * 1024 * 1024
    queue_capacity: int = 64
    """Jobs that may wait at one station; at least `max_in_flight`, or full queues reject what had room."""
    max_live: int = 20_000
    idle_s: float = 600.0
    limits: Limits = attrs.field(factory=Limits)
    result_bytes: int = 1024 * 1024
    report_bytes: int = 32 * 1024 * 1024
    upload_timeout_s: float = 60.0
    """For all attempts of one batch together; then it goes to the outbox, or has no home."""
    upload_empty: bool = False
    """Whether a batch without stations is uploaded too."""
    grace_s: float = 15.0
    """How long a cancelled pipeline may go on delivering what is open."""
    group_id: str = ""
    """Goes into the ids of batches of several messages."""

    def __attrs_post_init__(self) -> None:
        """Check the settings together."""
        faults = [
            f"{name}: {getattr(self, name)!r} is not above 0"
            for name in (
                "deadline_s",
                "max_in_flight",
                "max_in_flight_bytes",
                "queue_capacity",
                "max_live",
                "idle_s",
                "result_bytes",
                "report_bytes",
                "upload_timeout_s",
            )
            if not getattr(self, name) > 0
        ]
        if self.by not in get_args(Boundary):
            faults.append(f"by: {self.by!r} is none of {', '.join(get_args(Boundary))}")
        if not 0 < self.quorum <= 1:
            faults.append(f"quorum: {self.quorum!r} is not in 0 < quorum <= 1")
        if not self.grace_s >= 0:
            faults.append(f"grace_s: {self.grace_s!r} is below 0")
        if self.queue_capacity < self.max_in_flight:
            faults.append(
                f"queue_capacity: {self.queue_capacity} is below max_in_flight ({self.max_in_flight})"
            )
        if self.idle_s <= self.deadline_s:
            faults.append(f"idle_s: {self.idle_s:g} is not above deadline_s ({self.deadline_s:g})")
        if faults:
            raise ConfigError(faults)


@attrs.frozen(kw_only=True)
class PipelineStatistics:
    """A moment of the pipeline."""

    in_flight: int
    in_flight_bytes: int
    live_stations: int
    draining: bool
    blocked: tuple[str, ...] = ()
    """Stores that something waits for: `outbox`, `dead-letters`. Consumption pauses when the slots are used up."""
