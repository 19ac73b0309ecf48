"""The intake: how many batches may be open, and how many bytes in them."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import trio

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class Intake:
    """Counts open batches and their bytes, and wakes whoever waits for room.

    A batch that is larger than all the bytes is taken when nothing else is open.
    """

    def __init__(self, *, slots: int, max_bytes: int) -> None:
        self._slots = slots
        self._max_bytes = max_bytes
        self.in_flight: int = 0
        self.in_flight_bytes: int = 0
        self._left = trio.lowlevel.ParkingLot()
        self._elsewhere: tuple[trio.CancelScope, Callable[[], object]] | None = None
        """Whoever does something else meanwhile, and whether to interrupt it when the stations are eased."""

    def has_room(self, size_bytes: int) -> bool:
        """Tell whether a slot and the bytes are free now."""
        if not self.in_flight:
            return True
        return self.in_flight < self._slots and self.has_bytes(size_bytes)

    def has_bytes(self, size_bytes: int) -> bool:
        """Tell whether an open batch may grow by this much now."""
        return self.in_flight_bytes + size_bytes <= self._max_bytes

    def enter(self, size_bytes: int) -> None:
        """Take a slot."""
        self.in_flight += 1
        self.in_flight_bytes += size_bytes

    def grow(self, size_bytes: int) -> None:
        """Take bytes for a batch that has its slot."""
        self.in_flight_bytes += size_bytes

    def leave(self, size_bytes: int) -> None:
        """Free a slot and all the bytes of its batch."""
        self.in_flight -= 1
        self.in_flight_bytes -= size_bytes
        if self._left:
            self._left.unpark_all()
        if self._elsewhere is not None:
            self._elsewhere[0].cancel()

    def ease(self) -> None:
        """Take note that the stations may take more than before."""
        if self._left:
            self._left.unpark_all()
        if self._elsewhere is not None:
            scope, is_worth_it = self._elsewhere
            if not scope.cancel_called and is_worth_it():
                scope.cancel()

    async def wait_change(self) -> None:
        """Wait until a batch leaves, or the stations are eased."""
        await self._left.park()

    @contextmanager
    def until_change(self, is_worth_it: Callable[[], object]) -> Iterator[None]:
        """Cancel the block when a batch leaves, or the stations are eased and that is worth it; for one task at a time.

        Stations are eased all the time: a block that ended each time would never get anything done.
        """
        with trio.CancelScope() as scope:
            self._elsewhere = scope, is_worth_it
            try:
                yield
            finally:
                self._elsewhere = None

    async def wait_idle(self) -> None:
        """Wait until no batch is open."""
        await trio.lowlevel.checkpoint()
        while self.in_flight:
            await self._left.park()
