"""A store that takes nothing: said once when it begins, and once when nobody waits for it any more."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs
import trio

from stationmaster.events import StoreBlocked, StoreUnblocked

if TYPE_CHECKING:
    from stationmaster.abc import Observer
    from stationmaster.errors import StoreError


@attrs.define(eq=False)
class Blockage:
    """Those who wait for one store to take what they hold."""

    store: str
    """`outbox` or `dead-letters`."""
    _observer: Observer
    _waiting: int = attrs.field(default=0, init=False)
    _since: float = attrs.field(default=0.0, init=False)
    _over: trio.lowlevel.ParkingLot = attrs.field(factory=trio.lowlevel.ParkingLot, init=False)

    @property
    def lasts(self) -> bool:
        """Whether somebody waits."""
        return self._waiting > 0

    @property
    def lasted_s(self) -> float:
        """Seconds since the first of those who wait began to; 0 if nobody does."""
        return trio.current_time() - self._since if self._waiting else 0.0

    def begin(self, error: StoreError) -> None:
        """One more waits."""
        self._waiting += 1
        if self._waiting == 1:
            self._since = trio.current_time()
            self._observer.observe(
                StoreBlocked(store=self.store, kind=error.kind, detail=str(error))
            )

    def end(self) -> None:
        """One waits no more: it was taken, went elsewhere, or was given up."""
        self._waiting -= 1
        if not self._waiting:
            blocked_s = trio.current_time() - self._since
            self._over.unpark_all()
            self._observer.observe(StoreUnblocked(store=self.store, blocked_s=blocked_s))

    async def wait_over(self) -> None:  # noqa: ASYNC910 - a checkpoint only if somebody waits
        """Wait until nobody waits."""
        while self._waiting:
            await self._over.park()
