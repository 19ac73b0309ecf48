"""Each station's last outcome, as a bounded grid of slots whose changes can be told one by one.

Rules:
1. A station keeps its slot, so that a picture of the grid can be brought up to date by the slots that changed.
2. There are so many slots. When all are taken, a new station gets the slot of another, each in its turn.
3. An outcome is one letter: `CODES`.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Final

import attrs

from stationmaster.batch import Outcome

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from stationmaster.batch import StationResult

CODES: Final = {
    Outcome.SUCCEEDED: "s",
    Outcome.NO_OUTPUT: "n",
    Outcome.FAILED: "f",
    Outcome.TIMED_OUT: "t",
    Outcome.MISSING: "m",
    Outcome.REJECTED: "r",
}
OUTCOMES: Final = {code: outcome.value for outcome, code in CODES.items()}
DEFAULT_SLOTS: Final = 20_000


@attrs.define(eq=False)
class StationGrid:
    """The stations that were heard of, each with its last outcome."""

    slots: int = DEFAULT_SLOTS
    displaced: int = attrs.field(default=0, init=False)
    """Stations that lost their slot to others."""
    _slot_of: dict[str, int] = attrs.field(factory=dict, init=False)
    _ids: list[str] = attrs.field(factory=list, init=False)
    _codes: list[str] = attrs.field(factory=list, init=False)
    _changed: set[int] = attrs.field(factory=set, init=False)
    _next_displaced: int = attrs.field(default=0, init=False)

    def __len__(self) -> int:
        """Return how many stations it shows."""
        return len(self._ids)

    def take(self, results: Iterable[StationResult]) -> None:
        """Take the outcomes of one batch."""
        slot_of, codes, changed = self._slot_of, self._codes, self._changed
        for result in results:
            code = CODES[result.outcome]
            slot = slot_of.get(result.station_id)
            if slot is None:
                changed.add(self._enter(result.station_id, code))
            elif codes[slot] != code:
                codes[slot] = code
                changed.add(slot)

    def _enter(self, station_id: str, code: str) -> int:
        if len(self._ids) < self.slots:
            slot = len(self._ids)
            self._ids.append(station_id)
            self._codes.append(code)
        else:
            slot = self._next_displaced
            self._next_displaced = (slot + 1) % self.slots
            self.displaced += 1
            del self._slot_of[self._ids[slot]]
            self._ids[slot] = station_id
            self._codes[slot] = code
        self._slot_of[station_id] = slot
        return slot

    def counts(self) -> dict[str, int]:
        """Return outcome -> stations, those of nobody included."""
        counted = Counter(self._codes)
        return {outcome: counted[code] for code, outcome in OUTCOMES.items()}

    def rows(self) -> Iterator[tuple[str, str]]:
        """Yield (station id, outcome's letter) in the order of the slots."""
        return zip(self._ids, self._codes, strict=True)

    def piece(self, first: int, count: int) -> tuple[list[str], str]:
        """Return the ids of `count` slots from `first` on, and their letters as one text."""
        end = first + count
        return self._ids[first:end], "".join(self._codes[first:end])

    def take_changes(self) -> list[tuple[int, str, str]]:
        """Return (slot, station id, letter) of what changed since the last call, in order."""
        changed, self._changed = sorted(self._changed), set()
        return [(slot, self._ids[slot], self._codes[slot]) for slot in changed]
