"""The intake: how many batches may be open, and how many bytes in them."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import trio

if TYPE_CHECKING:
    from collections.abc import Iterator


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
        self._busy_elsewhere: trio.CancelScope | None = None

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
        self.nudge()

    async def wait_change(self) -> None:
        """Wait until a batch leaves, or the stations are eased."""
        await self._left.park()

    @contextmanager
    def until_change(self) -> Iterator[None]:
        """Cancel the block when a batch leaves or the stations are eased; for one task at a time."""
        with trio.CancelScope() as self._busy_elsewhere:
            yield
        self._busy_elsewhere = None

    def nudge(self) -> None:
        """Let a waiting poller look again."""
        if self._left:
            self._left.unpark_all()
        if self._busy_elsewhere is not None:
            self._busy_elsewhere.cancel()

    async def wait_idle(self) -> None:
        """Wait until no batch is open."""
        await trio.lowlevel.checkpoint()
        while self.in_flight:
            await self._left.park()
