"""What became of batches, written down; what the disk does not take now is written later, and said."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import attrs
import trio

from stationmaster.errors import StoreError
from stationmaster.events import StoreBlocked, StoreUnblocked

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection

    from stationmaster.abc import Observer

_STORE: Final = "outbox-replay"
_WRITE_S: Final = 10.0
"""How long the writer is waited for when everything is cancelled."""


@attrs.define(eq=False)
class Ledger:
    """One entry per batch whose end is known and not yet on the disk."""

    _observer: Observer
    _entries: dict[str, Callable[[], Awaitable[None]]] = attrs.field(factory=dict, init=False)
    """Batch id -> how to write it down. As many as are sent at once: while there is a rest nothing new is sent."""
    _blocked_since: float | None = attrs.field(default=None, init=False)

    def rest(self, under_way: Collection[str]) -> list[str]:
        """Return the batches whose own tasks (of those under way) did not manage to write them down."""
        return [batch_id for batch_id in self._entries if batch_id not in under_way]

    async def settle(self, batch_id: str, write: Callable[[], Awaitable[None]]) -> bool:
        """Write down what became of a batch; if the disk does not take it now, it is part of the rest.

        Returns:
            Whether it is written.

        Shielded, with a limit: else the next process would send again what was accepted when this one was leaving.
        """
        self._entries[batch_id] = write
        with trio.move_on_after(_WRITE_S, shield=True):  # noqa: ASYNC912 -- likewise
            try:
                await self.write(batch_id)
            except StoreError as error:
                self.say_blocked(error)
        return batch_id not in self._entries  # noqa: ASYNC910 -- every write is a checkpoint

    async def write(self, batch_id: str) -> None:
        """Write down one of the rest.

        Raises:
            StoreError: the disk does not take it; it stays.
        """
        await self._entries[batch_id]()
        del self._entries[batch_id]

    def say_blocked(self, error: StoreError) -> None:
        """Say that the disk fails, once until `say_unblocked`."""
        if self._blocked_since is None:
            self._blocked_since = trio.current_time()
            blocked = StoreBlocked(store=_STORE, kind=error.kind, detail=str(error))
            self._observer.observe(blocked)

    def say_unblocked(self) -> None:
        """Say that all is well again, if it was not."""
        if self._blocked_since is not None:
            blocked_s = trio.current_time() - self._blocked_since
            self._blocked_since = None
            self._observer.observe(StoreUnblocked(store=_STORE, blocked_s=blocked_s))
