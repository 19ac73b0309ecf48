"""An observer that remembers what it heard."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import attrs

if TYPE_CHECKING:
    from stationmaster.events import Event

EventT = TypeVar("EventT")


@attrs.define(eq=False)
class RecordingObserver:
    """Keeps every event in order; for tests (it grows without bound)."""

    detailed: bool = True
    events: list[Event] = attrs.field(factory=list, init=False)

    def observe(self, event: Event, /) -> None:
        """Remember it."""
        self.events.append(event)

    def of(self, kind: type[EventT]) -> list[EventT]:
        """Return the events of one kind, oldest first."""
        return [event for event in self.events if isinstance(event, kind)]
