"""The grace: every shield of a pipeline has a limit, and one hand on all of them."""

from __future__ import annotations

import math
from contextlib import contextmanager
from typing import TYPE_CHECKING

import attrs
import trio

if TYPE_CHECKING:
    from collections.abc import Iterator


@attrs.define(eq=False)
class Grace:
    """Hands out shields, and draws their limits in when the end is near."""

    begun: trio.Event = attrs.field(factory=trio.Event, init=False)
    """Set when the end is known."""
    _end: float = attrs.field(default=math.inf, init=False)
    _shields: set[trio.CancelScope] = attrs.field(factory=set, init=False)

    @property
    def is_over(self) -> bool:
        """Whether the end has come."""
        return trio.current_time() >= self._end

    @contextmanager
    def shielded(self, *, until: float = math.inf) -> Iterator[trio.CancelScope]:
        """Shield the block from every cancellation but its own limit (absolute) and the end of the grace."""
        with trio.CancelScope(shield=True, deadline=min(until, self._end)) as scope:
            self._shields.add(scope)
            try:
                yield scope
            finally:
                self._shields.discard(scope)

    def draw_in(self, end: float) -> None:
        """No shield holds longer than to this moment; the earliest that was ever told counts."""
        self.begun.set()
        self._end = min(self._end, end)
        for scope in self._shields:
            scope.deadline = min(scope.deadline, self._end)
