"""Counts what happened, for those who ask for numbers and not for events."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

from stationmaster.batch import Outcome
from stationmaster.events import (
    BatchClosed,
    BatchJoined,
    LateResult,
    StationBreakerClosed,
    StationBreakerOpened,
    ThreadAbandoned,
    ThreadReturned,
)

if TYPE_CHECKING:
    from stationmaster.abc import Observer
    from stationmaster.events import Event


@attrs.define(eq=False)
class Counting:
    """An observer that counts and passes on."""

    _observer: Observer
    late_results: int = attrs.field(default=0, init=False)
    missing: int = attrs.field(default=0, init=False)
    joined: int = attrs.field(default=0, init=False)
    follow_ups: int = attrs.field(default=0, init=False)
    duplicates: int = attrs.field(default=0, init=False)
    abandoned_threads: int = attrs.field(default=0, init=False)
    open_breakers: int = attrs.field(default=0, init=False)

    @property
    def detailed(self) -> bool:
        """Whether the observer behind wants events of every station and row."""
        return self._observer.detailed

    def observe(self, event: Event, /) -> None:
        """Count it, and pass it on."""
        match event:
            case LateResult():
                self.late_results += 1
            case BatchJoined():
                self.joined += 1
            case BatchClosed(report=report):
                self.missing += report.counts[Outcome.MISSING]
                self.follow_ups += report.batch.follow_up
                self.duplicates += report.batch.duplicates
            case ThreadAbandoned() | ThreadReturned():
                self.abandoned_threads = event.abandoned
            case StationBreakerOpened():
                self.open_breakers += 1
            case StationBreakerClosed():
                self.open_breakers -= 1
        self._observer.observe(event)
