"""What a call to the model server takes."""

from __future__ import annotations

import math
from typing import Final

import attrs

MEASURED_AFTER: Final = 8
"""Calls after which the cost model believes itself."""

_MEMORY: Final = 0.95  # weight of a call after each later one: about the last twenty count


@attrs.define(eq=False)
class CostModel:
    """Seconds of a call as `fixed_s + per_row_s x rows`: least squares over recent calls, neither part negative.

    While all calls have the same number of rows the cost is taken as constant.
    """

    fixed_s: float
    """Until `MEASURED_AFTER` calls were measured: what any call is believed to take."""
    per_row_s: float = attrs.field(default=0.0, init=False)
    guard_s: float = attrs.field(default=0.0, init=False)
    """Twice the spread around the line: about nineteen of twenty calls end within line + guard."""
    samples: int = attrs.field(default=0, init=False)
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
        if (
            spread > 1e-9 * self._weight * self._rows_rows
        ):  # else all sizes are equal, up to rounding
            slope = (self._weight * self._rows_seconds - self._rows * self._seconds) / spread
        slope = max(slope, 0.0)
        fixed = (self._seconds - slope * self._rows) / self._weight
        if fixed < 0:
            slope, fixed = self._rows_seconds / self._rows_rows, 0.0
        miss = seconds - fixed - slope * rows
        self._misses = self._misses * _MEMORY + miss * miss
        if self.samples >= MEASURED_AFTER:
            self.fixed_s, self.per_row_s = fixed, slope
            self.guard_s = 2 * math.sqrt(self._misses / self._weight)

    def estimate(self, rows: int) -> float:
        """Estimate the seconds of a call with that many rows."""
        return self.fixed_s + self.per_row_s * rows

    def cautious(self, rows: int) -> float:
        """Estimate the seconds within which such a call is nearly always answered."""
        return self.fixed_s + self.per_row_s * rows + self.guard_s

    def optimistic(self, rows: int) -> float:
        """Estimate the seconds that such a call nearly always takes at least; 0 while nothing is measured."""
        return max(self.estimate(rows) - self.guard_s, 0.0) if self.measured else 0.0
